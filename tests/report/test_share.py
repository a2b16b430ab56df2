"""Runs that are packed for others say nothing of the machine."""

import json
import socket
import zipfile

from made_up import result, run_report, save

from fmlora_jax.report.runs import load


def test_a_shared_run_has_its_numbers_and_neither_host_nor_paths(tmp_path):
  home = tmp_path / "secret_home"
  for seed in (1, 2):
    run = home / "runs" / str(seed)
    save(run, result(seed=seed, config={"tasks.data_dir": str(home / "photos")}))
    (run / "plots").mkdir()
    for name in (".lock", "plots/a.png", "error-1.txt", "events.1.host", "metrics.jsonl"):
      (run / name).write_text(socket.gethostname() if name[0] in ".e" else "{}\n")
    (run / "config.json").write_text(json.dumps({"config": {"weights": {"path": f"{home}/w.npz"}}}))
  done = run_report(home / "runs", f"--share={tmp_path / 'shared.zip'}")
  assert (done.returncode, done.stderr) == (0, "")
  assert f"packed 2 runs into {tmp_path / 'shared.zip'}" in done.stdout
  with zipfile.ZipFile(tmp_path / "shared.zip") as archive:
    names = ("result.json", "config.json", "metrics.jsonl", "plots/a.png")
    assert {*archive.namelist()} == {f"{seed}/{name}" for seed in (1, 2) for name in names}
    texts = [archive.read(name).decode() for name in archive.namelist()]
    archive.extractall(tmp_path / "there")
  assert not any("secret_home" in text for text in texts)
  assert '"w.npz"' in "".join(texts)
  (shared, _), (own, _) = load([tmp_path / "there"]), load([home / "runs"])
  assert [run["acc"] for run in shared] == [run["acc"] for run in own]
  assert shared[0]["config"]["tasks"]["data_dir"] == "photos"

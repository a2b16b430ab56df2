"""The fields of result.json that methods declare."""

from fmlora_jax.experiment.result import reported
from fmlora_jax.types import Reported

REPORTS = (
  Reported(name="rank", kind=int, field="ranks"),
  Reported(name="cosines", kind=list, field="last_cosines", is_final=True),
  Reported(name="complexity", kind=float, field="complexity"),
  Reported(name="loss", kind=float),
)


def test_a_field_lists_its_fact_of_all_tasks_or_has_that_of_the_last():
  facts = [{"rank": 4, "cosines": [1], "complexity": None}, {"rank": 2, "cosines": [2], "loss": 1}]
  assert reported(REPORTS, facts) == {"ranks": [4, 2], "last_cosines": [2], "complexity": None}
  facts[1]["complexity"] = 0.5
  assert reported(REPORTS, facts)["complexity"] == [None, 0.5]
  assert reported((), facts) == {}

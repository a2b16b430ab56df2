"""Finished runs side by side: tables, pictures, and the paper's numbers beside ours."""

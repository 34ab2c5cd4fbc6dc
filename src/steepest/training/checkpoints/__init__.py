"""What makes a checkpoint one of a run: which run it is of, names of its optimizer's states, random generators."""

__all__: list[str] = []

"""How well poses are estimated, on photographs, renders and BOP datasets: ``nope-ros evaluate``."""

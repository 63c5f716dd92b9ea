"""How the guards were made, as commands that make yours. Needs ``pip install 'guardmw[train]'``."""

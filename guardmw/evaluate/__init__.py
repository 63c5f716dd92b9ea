"""How good, how fast and how well calibrated is a guard?"""

"""The metric `longvideo_mcq`: `evaluate.load` takes this folder's path, and `answers.py` alone needs nothing at all."""

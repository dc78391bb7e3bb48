"""COMPUTES: executors behind one seam (`executor.py`). Importing the package imports no torch; the modules do."""

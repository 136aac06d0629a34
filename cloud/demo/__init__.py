"""The demonstration: a fleet in a temporary directory, from the first reading to the model that scores on it.

Start at `runner.py`. `simulator.py` and `track.py` make the readings, `cmapss.py` takes NASA's instead;
`oracle.py` knows what must be true of the lake, `report.py` says whether it was.
"""

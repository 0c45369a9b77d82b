"""A frozen model as a pure function of (params, rows): forward, readout, rows, precision, checks."""

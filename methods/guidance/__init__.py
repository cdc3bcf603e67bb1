"""The rules of guidance: at which model calls the negative is evaluated, and what stands in for it at the others.

A rule is a frozen dataclass of numbers with a session beside it, which lives as long as one run:

    session.py       what every session answers to; the run asks nothing else and never which rule it has
    adaptive.py      Adaptive Guidance: the negative is left out once it is like the conditional prediction
    extrapolated.py  the term of guidance moves on along a line between evaluations of the negative
    line.py          that line, and what is made up for where it has missed
    turns.py         and at which steps the negative is evaluated
    linear.py        LinearAG: the negative is foretold from all predictions before
    calibration.py   paths along which thresholds and coefficients are found
    record.py        what guidance did in a run

Guidance sees predictions that a composition method has already mixed, so every rule works with every method.
"""

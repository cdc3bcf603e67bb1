"""Guidance on a MODEL: from what a user chose on a node to what happens at each model call.

    options.py     what a node offers, and the guidance it makes of that
    apply.py       what a MODEL carries, and how a run of it begins and ends
    run.py         one run: at each model call, what the rule's session needs is evaluated
    call.py        one model call, and what keeps other nodes' formulas right in it
    calibrate.py   sampled paths, and what is found along them
    left.py        what a run leaves for the next one of its picture
    coeffs.py      what was found, and whether it fits a run
    files.py       its files
    identity.py    a name for what was calibrated

The rules themselves know no ComfyUI: methods/guidance/.
"""

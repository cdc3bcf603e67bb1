"""ControlNets see the indexes their caller meant."""

from __future__ import annotations


class ControlView:
    """A control as inner code of one run sees it. Core hands the batch's cond indexes to a control before any wrapper
    around the model runs, so the view translates them here. Everything else is the control itself."""

    def __init__(self, control, translate):
        self._control, self._translate = control, translate

    def __getattr__(self, name):
        return getattr(self._control, name)

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        return self._control.get_control(x_noisy, t, cond, batched_number, self._translate(transformer_options))

    def get_instance_for_device(self, device):
        return ControlView(self._control.get_instance_for_device(device), self._translate)

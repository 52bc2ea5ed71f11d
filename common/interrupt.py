"""Orderly ends: SIGTERM and Ctrl-C ask a long run to finish its step and save, instead of killing it."""

import signal


class StopSignal:
    """`raised` turns true at SIGTERM or the first Ctrl-C; a second one raises KeyboardInterrupt at once."""

    def __init__(self):
        self.raised = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._handle)

    def _handle(self, number, frame):
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True

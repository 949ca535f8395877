"""Wakes whoever waits for something to happen to the jobs of this process. Holds nothing of what has happened."""

import asyncio


class JobNews:
    """Use it on the event loop's thread. What other processes do with the same job file is not heard here."""

    def __init__(self) -> None:
        self._upcoming = asyncio.Event()
        self.is_closed = False

    def tell(self) -> None:
        """Something has happened."""
        self._upcoming.set()
        self._upcoming = asyncio.Event()

    def upcoming(self) -> asyncio.Event:
        """Set when the next thing happens. Ask for it before you look at the store, so that nothing slips between."""
        return self._upcoming

    def close(self) -> None:
        """Nothing more will be told: the server ends."""
        self.is_closed = True
        self.tell()

"""Files that others write while they are read, on file systems that several machines share.

Belongs here: what is new in one. Not here: what it means (`messages`, the launchers).
"""

from pathlib import Path


class Tail:
    """The lines of a growing file, each once and whole.

    The file is opened anew for each look: on NFS that is what shows another machine's writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0
        self._begun = b""

    def lines(self) -> list[str]:
        """The lines ended since the last look; none where the file is not there (yet)."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return []
        self._read += len(new)
        *whole, self._begun = (self._begun + new).split(b"\n")
        return [line.decode(errors="replace") for line in whole]

    def last_lines(self) -> list[str]:
        """As `lines`, with a last line that nobody will end any more."""
        lines = self.lines()
        begun, self._begun = self._begun, b""
        return [*lines, begun.decode(errors="replace")] if begun else lines

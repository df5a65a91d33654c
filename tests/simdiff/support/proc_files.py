"""Files of /proc whose content a test gives."""

from __future__ import annotations

from types import SimpleNamespace


class Files:
    """What the paths of /proc hold; a name that is not among them cannot be read."""

    def __init__(self, **texts: str) -> None:
        self.texts = texts

    def __call__(self, path: str) -> SimpleNamespace:
        def read_text() -> str:
            name = path.removeprefix("/proc/")
            if name not in self.texts:
                raise OSError(path)
            return self.texts[name]

        return SimpleNamespace(read_text=read_text)

"""A bundle on disk: its manifest, its files and its recorded samples."""

from qpert.runtime.bundle.folder import Bundle

__all__ = ["Bundle"]

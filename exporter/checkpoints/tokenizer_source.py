"""Where a checkpoint's vocabulary comes from: the user's option, the checkpoint's folder, or the hub."""

from __future__ import annotations

from pathlib import Path

from qpert.runtime.errors import InputError, UnavailableError
from qpert.runtime.libraries import turn_off_telemetry
from qpert.runtime.progress import Progress


def find_tokenizer(asked: str | None, own: Path | None, usual: str | None, progress: Progress) -> Path:
    """A vocabulary file, or a folder with one.

    Args:
        asked: `--tokenizer`: a vocab.txt, a tokenizer.json, a folder or a hub id; None takes the
            checkpoint's own, else `usual` from the hub.
        own: the vocabulary in the checkpoint's folder.
        usual: the hub id of the family's vocabulary; None if every checkpoint has its own.

    Raises:
        InputError: the given file does not exist, or none was given and there is none.
        UnavailableError: the hub cannot be reached, or huggingface-hub is not installed.
    """
    if asked is None and own is not None:
        return own
    name = asked or usual
    if name is None:
        raise InputError(
            "the checkpoint's folder has no tokenizer; pass --tokenizer with a tokenizer.json, a folder or a hub id",
            code="tokenizer-missing",
        )
    if Path(name).exists():
        return Path(name)
    if asked and (name.startswith((".", "/", "~")) or name.endswith((".txt", ".json")) or name.count("/") > 1):
        raise InputError(
            f"--tokenizer {name} does not exist; expected a vocab.txt, a tokenizer.json, a folder or a hub id",
            code="tokenizer-not-found",
        )
    progress.say(f"tokenizer: {name} from the Hugging Face hub")
    return download_tokenizer(name)


def download_tokenizer(name: str) -> Path:
    """The folder of a hub repository's vocabulary files."""
    turn_off_telemetry()
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise UnavailableError(
            f"the vocabulary {name!r} is on the Hugging Face hub, but huggingface-hub is not installed; "
            "pip install 'qpert[hf]', or pass --tokenizer with a vocab.txt or tokenizer.json",
            code="hf-extra-missing",
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["vocab.txt", "tokenizer.json", "tokenizer_config.json"]))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UnavailableError(
            f"cannot download the vocabulary {name!r} from the Hugging Face hub ({type(error).__name__}); download "
            f"vocab.txt of {name} on a machine with a network and pass it with --tokenizer vocab.txt",
            code="hub-download-failed",
        ) from error

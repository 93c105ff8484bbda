"""Threads that do not spin: asked for by servers, kept by copies, and without effect on results."""

import pickle

import numpy as np
import pytest

from qpert.runtime import Retriever
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.retrieval.encoder import Encoder

ENTRY = "session.intra_op.allow_spinning"


def spinning(encoder):
    """What each of ONNX Runtime's sessions was opened with; None where it decides."""

    def entry(options):
        try:
            return options.get_session_config_entry(ENTRY)
        except RuntimeError:  # "does not have configuration with key"
            return None

    return {entry(session._session.get_session_options()) for session in encoder.sessions.values()}


@pytest.mark.parametrize(("spin", "expected"), [(False, {"0"}), (True, {None})])
def test_a_retriever_opens_its_sessions_as_asked(tiny_bundle, spin, expected):
    with Retriever.open(tiny_bundle, threads=2, spin=spin) as retriever:
        assert spinning(retriever.encoder) == expected
        assert (retriever.encoder.threads, retriever.encoder.settings.spin) == (2, spin)


def test_it_is_left_to_onnx_runtime_by_default(tiny_bundle):
    with Retriever.open(tiny_bundle) as retriever:
        assert spinning(retriever.encoder) == {None}


def test_copies_keep_it_and_results_do_not_depend_on_it(tiny_bundle, random_pictures):
    encoder = Encoder(Bundle.open(tiny_bundle), "cpu", threads=2, spin=False, length_step=4)
    again = pickle.loads(pickle.dumps(encoder))
    assert spinning(again) == {"0"}
    assert again.settings == encoder.settings
    assert again.tokenizer.length_step == 4
    plain = Encoder(Bundle.open(tiny_bundle), "cpu", threads=2)
    pictures = random_pictures(3)
    for one in (encoder, again):
        np.testing.assert_array_equal(
            one.encode_images(pictures).query_embeds, plain.encode_images(pictures).query_embeds
        )
        np.testing.assert_array_equal(one.encode_texts(["a", "a b"]), plain.encode_texts(["a", "a b"]))

"""INT8 of detectors, judged by what they find."""

"""The curves of a run."""

from __future__ import annotations

import numpy as np

from tcurlora_ext.segmentation.report.figures import trailing_mean


def test_the_mean_of_the_last_steps_begins_with_the_first() -> None:
    values = np.arange(12.0)
    expected = [np.mean(values[max(0, step - 2) : step + 1]) for step in range(12)]
    np.testing.assert_allclose(trailing_mean(values, 3), expected)
    np.testing.assert_array_equal(trailing_mean(np.array([4.0, 2.0])), [4.0, 3.0])
    assert trailing_mean(np.array([])).shape == (0,)

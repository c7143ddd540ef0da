from __future__ import annotations

import math
from typing import Any

import pytest

from dynacomm_async.errors import ConfigError
from dynacomm_async.link import LinkSettings


def test_settings_default_to_a_link_that_changes_nothing() -> None:
    settings = LinkSettings()
    assert settings.rate_down_bytes_per_s is None
    assert settings.rate_up_bytes_per_s is None
    assert (settings.delay_s, settings.overhead_s, settings.schedule) == (0.0, 0.0, ())
    assert not settings.half_duplex
    assert not settings.shared


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rate_down_bytes_per_s": 0}, "rate_down_bytes_per_s is 0"),
        ({"rate_up_bytes_per_s": -1.0}, "rate_up_bytes_per_s is -1.0"),
        ({"rate_up_bytes_per_s": math.nan}, "rate_up_bytes_per_s is nan"),
        ({"rate_down_bytes_per_s": math.inf}, "rate_down_bytes_per_s is inf"),
        ({"delay_s": -0.1}, "delay_s is -0.1"),
        ({"overhead_s": math.inf}, "overhead_s is inf"),
        ({"schedule": ((-1.0, None, None),)}, "a time in schedule is -1.0"),
        ({"schedule": ((0.0, 1.0, 0.0),)}, "a rate in schedule is 0.0"),
        ({"schedule": ((1.0, 1.0, 1.0), (1.0, 2.0, 2.0))}, "times must increase"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        LinkSettings(**wrong)

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from jaxserve.request import FinishReason, InvalidRequest, Request, SamplingParams

NAN, INF = float("nan"), float("inf")

WRONG = {
    "max_tokens": [0, -1, 1.5, "8", True, 10**400],
    "temperature": [-0.1, NAN, INF, -INF, "1", None, True, 1e7, 10**400],
    "top_p": [0, 0.0, -0.5, 1.01, NAN, "1", None, False],
    "top_k": [-2, 1.5, None, 2**31, "4", True],
    "min_p": [-0.01, 1.1, NAN, None, "0", True],
    "seed": [1.5, "7", True, 2**63, -(2**63) - 1],
    "stop": ["", [""], [1], None, 5, {"a"}, {"a": 1}, [None]],
    "stop_token_ids": [[-1], ["a"], [1.0], 3, None, [True], "12", [2**31]],
    "ignore_eos": [0, 1, None, "yes"],
}

RIGHT = {
    "max_tokens": [None, 1, 10**6],
    "temperature": [0, 0.0, 1, 2.5, 100.0],
    "top_p": [1e-9, 0.5, 1, 1.0],
    "top_k": [-1, 0, 1, 2**31 - 1],
    "min_p": [0, 0.5, 1],
    "seed": [None, 0, -1, 2**32, 2**63 - 1, -(2**63)],
    "stop": [(), ("a",), ("a", "\n\n")],
    "stop_token_ids": [(), (0,), (5, 6)],
    "ignore_eos": [True, False],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}={value!r:.20}")
        for name, values in table.items()
        for value in values
    ]


def test_both_tables_name_every_field() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(WRONG) == set(RIGHT) == fields


@pytest.mark.parametrize(("name", "value"), cases(WRONG))
def test_a_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}=.* must be ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("name", "value"), cases(RIGHT))
def test_a_right_value_is_kept(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_the_error_shows_value_and_allowed_range() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(top_p=1.5)
    assert str(caught.value) == "top_p=1.5 must be a number above 0 and at most 1."


def test_all_wrong_fields_are_listed_at_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(max_tokens=0, top_p=2, min_p=-1)
    assert caught.value.field == "max_tokens"
    assert all(f"{name}=" in str(caught.value) for name in ("max_tokens", "top_p", "min_p"))


def test_invalid_request_is_a_value_error() -> None:
    assert issubclass(InvalidRequest, ValueError)
    assert InvalidRequest("no").field is None


def test_lists_become_tuples_and_one_stop_string_is_one() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2])
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (1, 2))
    hash(params)


def test_numpy_numbers_become_python_ones() -> None:
    params = SamplingParams(max_tokens=np.int32(4), temperature=np.float32(0.5), seed=np.int64(3))
    assert [type(x) for x in (params.max_tokens, params.temperature, params.seed)] == [
        int,
        float,
        int,
    ]


def test_finish_reasons_are_the_strings_clients_see() -> None:
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "abort", "error"]


@pytest.mark.parametrize(("ignore_eos", "end_ids"), [(False, {1, 2, 3}), (True, {3})])
def test_end_tokens_of_a_request(ignore_eos: bool, end_ids: set[int]) -> None:
    sampling = SamplingParams(stop_token_ids=(3,), ignore_eos=ignore_eos)
    request = Request("a", [5], 1, sampling, frozenset({1, 2}))
    assert request.end_ids == end_ids
    assert request.num_output == 0
    assert not request.is_finished

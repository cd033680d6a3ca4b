"""Rounding AdamW's moments keeps what they would be; and what is checked of them before they are saved."""

import pytest
import torch

from dssk.errors import DamagedData
from dssk.training import state
from dssk.training.state import MomentRounding


def second_moment(
    beta2: float, gradients: torch.Tensor, seed: int | None = 0, width: int = 256
) -> torch.Tensor:
    """AdamW's second moment of `width` weights after steps with these gradients; `seed` None: exact."""
    weights = torch.nn.Parameter(torch.zeros(width))
    optimizer = torch.optim.AdamW([weights], lr=0.0, betas=(0.9, beta2))
    if seed is not None:
        optimizer.register_step_post_hook(MomentRounding(seed))
    for gradient in gradients:
        weights.grad = torch.full_like(weights, float(gradient))
        optimizer.step()
    return optimizer.state[weights]["exp_avg_sq"]


def test_a_spike_decays_as_it_does_in_fp32():
    gradients = torch.zeros(2000)
    gradients[0] = (1 / 0.002) ** 0.5
    exact, rounded = second_moment(0.998, gradients, None).mean(), second_moment(0.998, gradients).mean()
    assert exact == pytest.approx(0.998**1999, rel=1e-3)
    assert rounded == pytest.approx(float(exact), rel=0.1)  # to the nearest it would be 0.98


@pytest.mark.parametrize("beta2", [0.95, 0.98, 0.998])
def test_a_moment_reaches_what_it_averages(beta2):
    gradients = torch.ones(round(10 / (1 - beta2)))
    assert second_moment(beta2, gradients).mean() == pytest.approx(
        1.0, abs=0.005
    )  # to the nearest 0.96 to 0.5


def test_rounding_is_to_bfloat16_and_decided_by_seed_and_step_alone():
    gradients = torch.rand(20, generator=torch.Generator().manual_seed(0))
    first = second_moment(0.98, gradients)
    assert torch.equal(first, first.bfloat16().float())
    torch.rand(3)  # other random numbers change nothing
    assert torch.equal(first, second_moment(0.98, gradients))
    assert not torch.equal(first, second_moment(0.98, gradients, seed=1))


def test_rounding_keeps_what_is_not_finite_and_the_sign():
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -1.0, -1.001])
    state = {"step": torch.tensor(1.0), "exp_avg": values.clone(), "exp_avg_sq": values.clone()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(6))])
    optimizer.state[optimizer.param_groups[0]["params"][0]] = state
    MomentRounding(0)(optimizer)
    for name in ("exp_avg", "exp_avg_sq"):
        assert state[name][:5].tolist()[1:] == values[:5].tolist()[1:]
        assert state[name][0].isnan()
        assert -1.0079 < state[name][5] <= -1.0


def test_the_roundings_of_one_step_are_those_of_no_other():
    weights = torch.nn.Parameter(torch.zeros(64))
    optimizer = torch.optim.AdamW([weights])
    rounded = []
    for step in (1, 2):
        moments = {name: torch.full((64,), 1.001) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weights] = {"step": torch.tensor(float(step)), **moments}
        MomentRounding(0)(optimizer)
        rounded.append(moments)
    assert not torch.equal(rounded[0]["exp_avg"], rounded[1]["exp_avg"])
    assert not torch.equal(rounded[0]["exp_avg"], rounded[0]["exp_avg_sq"])


def test_a_checkpoint_that_fits_its_checksums_and_nothing_else_is_damage(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DamagedData, match="does not hold what it should.*-r 1"):
        state.restore(None, tmp_path)
    (tmp_path / state.STATE_FILE).write_text('{"ranks": 5}')
    with pytest.raises(DamagedData, match="does not hold what it should.*-r 1"):
        state.restore_rank(None, tmp_path)

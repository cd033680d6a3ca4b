import pytest
import torch

from dssk.models import loss
from dssk.models.loss import next_token_loss, shifted


def loss_of(hidden_states, head, labels, **settings):
    """The loss with a plain matrix as head."""
    return next_token_loss(hidden_states, lambda s: s @ head.T, shifted(labels), len(head), **settings)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    labels = torch.randint(0, 50, (3, 9))
    labels[torch.rand(3, 9) < 0.4] = -100
    return torch.randn(3, 9, 16, requires_grad=True), torch.randn(50, 16), labels


def reference(hidden_states, head, labels, label_smoothing=0.0):
    logits = (hidden_states @ head.T)[:, :-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:], label_smoothing=label_smoothing)


@pytest.mark.parametrize("chunk_logits", [2**25, 1, 150, 250])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chunks_change_neither_loss_nor_gradient(batch, monkeypatch, chunk_logits, smoothing):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_logits)
    expected = reference(*batch, smoothing)
    (expected_gradient,) = torch.autograd.grad(expected, batch[0])
    found = loss_of(*batch, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, batch[0])[0], expected_gradient)


def test_no_more_than_a_chunk_of_logits_exists_at_a_time(batch, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 5 * 50)
    seen = []
    states, head, labels = batch
    next_token_loss(states, lambda s: seen.append(len(s)) or s @ head.T, shifted(labels), 50).backward()
    labelled = int((batch[2][:, 1:] != -100).sum())
    assert max(seen) == 5
    assert sum(seen) == 2 * labelled  # once forward and once more in the backward pass


def test_a_batch_without_labels_has_a_loss_of_zero(batch):
    assert loss_of(batch[0], batch[1], torch.full((3, 9), -100)).item() == 0


def test_half_precision_is_summed_in_single(batch):
    hidden_states, head, labels = batch
    found = loss_of(hidden_states.bfloat16(), head.bfloat16(), labels)
    assert found.dtype == torch.float32
    expected = reference(hidden_states.bfloat16().float(), head.bfloat16().float(), labels)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.01)

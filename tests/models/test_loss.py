import pytest
import torch

from dssk.models import loss
from dssk.models.loss import next_token_loss


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
    found = next_token_loss(*batch, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, batch[0])[0], expected_gradient)


def test_no_more_than_a_chunk_of_logits_exists_at_a_time(batch, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 4 * 50)
    seen = []
    monkeypatch.setattr(loss, "linear", lambda s, w: seen.append(len(s)) or torch.nn.functional.linear(s, w))
    next_token_loss(*batch).backward()
    labelled = int((batch[2][:, 1:] != -100).sum())
    assert max(seen) == 4
    assert sum(seen) == 2 * labelled  # once forward and once more in the backward pass


def test_a_batch_without_labels_has_a_loss_of_zero(batch):
    assert next_token_loss(batch[0], batch[1], torch.full((3, 9), -100)).item() == 0


def test_half_precision_is_summed_in_single(batch):
    hidden_states, head, labels = batch
    found = next_token_loss(hidden_states.bfloat16(), head.bfloat16(), labels)
    assert found.dtype == torch.float32
    expected = reference(hidden_states.bfloat16().float(), head.bfloat16().float(), labels)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.01)

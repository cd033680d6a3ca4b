"""`dssk env` says what an issue report needs, whatever is missing, and never a secret."""

import importlib.metadata
import sys

from dssk.commands import env


def test_it_names_versions_devices_and_disks(run_command):
    said = run_command(env)
    titles = [line for line in said.splitlines() if not line.startswith(" ")]
    assert titles == ["versions", "extras", "devices", "programs", "environment", "caches and free disk"]
    assert importlib.metadata.version("transformers") in said
    assert "cores of" in said
    assert said.count(" free\n") == 3


def test_it_shows_no_secret(run_command, monkeypatch):
    for name in (*env.SECRETS, "WANDB_BASE_URL", "HF_ENDPOINT", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "https://me:hunter2@hub.example/x")
    said = run_command(env)
    assert "hunter2" not in said
    assert "HF_ENDPOINT: host hub.example" in said
    assert "WANDB_API_KEY: set" in said


def test_what_is_missing_is_named_with_how_to_get_it(run_command, monkeypatch):
    def no_such_package(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", no_such_package)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["torch>=2", "gradio>=6; extra == 'demo'"]
    )
    said = run_command(env)
    assert 'demo          missing gradio: pip install "dssk[demo]"' in said
    assert "GPU     unknown, torch cannot be imported" in said
    monkeypatch.setattr(importlib.metadata, "requires", no_such_package)
    assert "dssk is not installed here" in run_command(env)

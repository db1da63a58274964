"""The command `id3-optim env`: versions, and which backends can run here."""

import argparse
import importlib.metadata
import os
import platform

import torch

import id3_kernels


def run_env(arguments: argparse.Namespace) -> None:
    """Prints versions, devices and backends. arguments: none are read."""
    print(f"python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in (
        "id3-optim",
        "torch",
        "triton",
        "transformers",
        "accelerate",
        "peft",
        "trl",
        "lightning",
        "safetensors",
        "matplotlib",
        "plotly",
    ):
        print(f"{package} {version_of(package)}")
    print(f"threads {torch.get_num_threads()} of {os.cpu_count()} cores")
    for device in range(torch.cuda.device_count()):
        print(f"cuda:{device} {torch.cuda.get_device_name(device)}")
    for name, obstacle in id3_kernels.available_backends().items():
        print(f"backend {name}: {'available' if obstacle is None else obstacle}")


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

# SPDX-License-Identifier: Apache-2.0
"""Every error that opt-zoo raises on purpose, each also of the built-in kind that callers expect."""


class OPTError(Exception):
    """The parent of all: `except OPTError` catches what opt-zoo found wrong, and nothing else."""


class ConfigError(OPTError, ValueError):
    """A configuration that describes no OPT model, or options that contradict each other."""


class InputError(OPTError, ValueError):
    """Arguments of a call that do not fit each other or the model."""


class CheckpointError(OPTError, ValueError):
    """A checkpoint whose tensors do not fit the model (missing, unexpected, wrong shape)."""


class FormatError(CheckpointError):
    """A file that is damaged, lies about itself, or asks for something a weight file never needs."""


class HubError(OPTError, OSError):
    """A model that could be found neither on disk nor on the hub."""


class UnsupportedError(OPTError, NotImplementedError):
    """A valid request that this release, or this backend, cannot do."""

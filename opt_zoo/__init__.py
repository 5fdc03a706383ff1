# SPDX-License-Identifier: Apache-2.0
"""The command `opt-zoo`: demo, generate, accuracy, inspect, convert, verify.

Each command is one call of a library; every framework runs in a process of its own (`worker.py`).
"""

# SPDX-License-Identifier: Apache-2.0
"""Executes the decode plans of `opt_core.generation`."""

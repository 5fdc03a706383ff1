# SPDX-License-Identifier: Apache-2.0
"""How text is generated: decided here as data, executed in three loops."""

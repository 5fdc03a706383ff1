# SPDX-License-Identifier: Apache-2.0
"""Live comparison with the reference and with other readers of our files (`make oracle`)."""

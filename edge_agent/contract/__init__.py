"""What edge and cloud agree on: topics, streams, blocks, receipts, state, bundles, errors.

Everything here turns bytes into checked values and back. No socket, file, clock, thread or log.
"""

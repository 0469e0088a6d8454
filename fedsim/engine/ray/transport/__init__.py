"""How calls reach workers: by pipes and mapped memory on this machine, through Ray and its object store on others.

The driver opens a worker, sends it calls and takes up what comes back (``driver.Transport``); the worker accepts and
makes the calls (``receiver.Receiver``). Nothing here imports Ray, and workers of one machine do without it.
"""

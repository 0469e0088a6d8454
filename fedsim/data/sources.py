"""Every data source under one name: functions that return a ``Dataset``. Each is reached from ``conf/data``.

With a ``path`` nothing is fetched; image sets without one come from the hub through the ``datasets`` library.
"""

from fedsim.data.digits import digits
from fedsim.data.domains import digits6, office_caltech10, pacs
from fedsim.data.images import cifar10, cifar100, fashion_mnist, mnist, parquet
from fedsim.data.multidomain import digits5, distorted_digits, domain_images
from fedsim.data.tabular import blobs, heart_disease, synthetic, tensors
from fedsim.data.text import shakespeare

__all__ = [
    "blobs",
    "cifar10",
    "cifar100",
    "digits",
    "digits5",
    "digits6",
    "distorted_digits",
    "domain_images",
    "fashion_mnist",
    "heart_disease",
    "mnist",
    "office_caltech10",
    "pacs",
    "parquet",
    "shakespeare",
    "synthetic",
    "tensors",
]

"""Every data source under one name: functions that return a ``Dataset``. Each is reached from ``conf/data``.

With a ``path`` nothing is fetched; image sets without one come from the hub through the ``datasets`` library. Sources
of labelled images and ``blobs`` take ``imbalance`` and ``largest``, which make the training set long-tailed (see
``fedsim.data.longtail.long_tail``).
"""

from collections.abc import Mapping
from typing import Any

from fedsim.data import digits as _digits
from fedsim.data import image_tables as _image_tables
from fedsim.data import images as _images
from fedsim.data import multidomain as _multidomain
from fedsim.data import tabular as _tabular
from fedsim.data.coco import coco
from fedsim.data.dataset import Dataset
from fedsim.data.files import PathLike
from fedsim.data.image_folders import image_folder
from fedsim.data.language import shakespeare_tokens
from fedsim.data.longtail import tailed
from fedsim.data.multidomain import digits5, distorted_digits, domain_images
from fedsim.data.own_tables import table
from fedsim.data.tabular import heart_disease, synthetic, tensors
from fedsim.data.text import shakespeare
from fedsim.data.weather import weather_shapes
from fedsim.errors import ConfigError

blobs = tailed(_tabular.blobs)
cifar10 = tailed(_images.cifar10)
cifar100 = tailed(_images.cifar100)
digits = tailed(_digits.digits)
digits6 = tailed(_multidomain.digits6)
fashion_mnist = tailed(_images.fashion_mnist)
mnist = tailed(_images.mnist)
office_caltech10 = tailed(_multidomain.office_caltech10)
pacs = tailed(_multidomain.domain_images)
parquet = tailed(_image_tables.parquet)


def own(path: PathLike | None, *, contract: Mapping[str, Any] | None = None) -> Dataset:
    """Stands for a function of one's own in ``data=own``, until ``data._target_`` names that."""
    raise ConfigError(
        "data=own: type data._target_=<module>.<function>, which takes path, and contract if it likes, and returns a "
        "fedsim.data.dataset.Dataset (docs/own_data.md)"
    )


__all__ = [
    "blobs",
    "cifar10",
    "cifar100",
    "coco",
    "digits",
    "digits5",
    "digits6",
    "distorted_digits",
    "domain_images",
    "fashion_mnist",
    "heart_disease",
    "image_folder",
    "mnist",
    "office_caltech10",
    "own",
    "pacs",
    "parquet",
    "shakespeare",
    "shakespeare_tokens",
    "synthetic",
    "table",
    "tensors",
    "weather_shapes",
]

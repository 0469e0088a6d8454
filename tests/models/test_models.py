"""Models: published parameter counts, shapes, the split into features and head, and refusals."""

from __future__ import annotations

import pickle

import pytest
import torch
from composing import compose_quickly

from fedsim import models
from fedsim.data.dataset import Dataset, Samples
from fedsim.errors import ConfigError
from fedsim.run import initial

RESNET = {"norm": "group", "groups": 2, "stem": "imagenet"}
DIGITS = {"channels": [64, 64, 128], "hidden": [2048, 512]}
LSTM = {"embedding": 8, "hidden": 256, "layers": 2}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("factory", "shape", "classes", "options", "parameters"),
    [
        (models.Linear, (1, 28, 28), 10, {}, 7_850),
        (models.MLP, (1, 28, 28), 10, {"hidden": [200, 200]}, 199_210),  # McMahan et al. 2017
        (models.MLP, (1, 8, 8), 10, {"hidden": []}, 650),
        (models.MLP, (1, 8, 8), 10, {"hidden": [6, 5], "batch_norm": True}, 390 + 12 + 35 + 10 + 60),
        (models.LeNet, (3, 32, 32), 10, {}, 62_006),
        (models.CNN, (1, 28, 28), 10, {}, 1_663_370),  # McMahan et al. 2017
        (models.CNN, (1, 8, 8), 10, {}, 832 + 51_264 + 256 * 512 + 512 + 5_130),
        (models.ResNet18, (3, 32, 32), 10, RESNET, 11_181_642),  # torchvision's 11 689 512 with 10 classes
        (models.ResNet18, (3, 32, 32), 10, RESNET | {"norm": "batch", "stem": "cifar"}, 11_173_962),
        (models.DigitsCNN, (3, 32, 32), 10, DIGITS, 18_151_370),
        (models.CharLSTM, (80,), 80, LSTM, 640 + 798_720 + 20_560),
    ],
)
def test_parameters_features_and_head(factory, shape, classes, options, parameters):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = factory(input_shape=shape, num_classes=classes, **options)
    assert count(model) == parameters
    x = torch.rand(2, *shape) if len(shape) == 3 else torch.randint(classes, (2, *shape))
    model.eval()
    features = model.features(x)
    assert features.shape == (2, model.head.in_features)
    assert torch.equal(model(x), model.head(features)) and model(x).shape == (2, classes)
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy(x), model(x))


def test_small_odd_images_work():
    for shape in ((1, 8, 8), (3, 17, 19)):
        x = torch.rand(2, *shape)
        assert models.CNN(shape, 4)(x).shape == (2, 4)
        assert models.ResNet18(shape, 4, **RESNET | {"stem": "cifar"})(x).shape == (2, 4)
    assert models.LeNet((3, 17, 19), 4)(torch.rand(2, 3, 17, 19)).shape == (2, 4)


def test_the_digits_network_flattens_to_8192_as_its_authors_do():
    model = models.DigitsCNN((3, 32, 32), 10, **DIGITS)
    assert model.layers[0].in_features == 8192
    for side in (16, 17, 18, 19, 28):
        small = models.DigitsCNN((1, side, side + 1), 4, channels=[2, 3, 4], hidden=[6, 5])
        assert small(torch.rand(2, 1, side, side + 1)).shape == (2, 4)


def torchvision_names(state):
    """Our ResNet-18's tensors under torchvision's names, in its order."""
    out = {}
    for key, value in state.items():
        key = key.replace("head.", "fc.").replace("shortcut", "downsample").replace("norm", "bn")
        if key.startswith("blocks."):
            _, block, rest = key.split(".", 2)
            key = f"layer{int(block) // 2 + 1}.{int(block) % 2}.{rest}"
        out[key] = value
    return out


@pytest.mark.parametrize("classes", [10, 7])
def test_resnet_starts_from_a_torchvision_file(classes, tmp_path):
    options = RESNET | {"norm": "batch"}
    source = models.ResNet18((3, 32, 32), 10, **options)
    source.norm1.running_mean.fill_(3)
    torch.save(torchvision_names(source.state_dict()), tmp_path / "resnet18.pth")
    model = models.ResNet18((3, 32, 32), classes, **options, weights=str(tmp_path / "resnet18.pth"))
    for name, value in source.state_dict().items():
        taken = model.state_dict()[name]
        if classes == 10 or not name.startswith("head"):
            assert torch.equal(taken, value), name
    assert len(model.head.bias) == classes
    with pytest.raises(ConfigError, match="not a ResNet-18 of torchvision"):
        models.ResNet18((3, 32, 32), 10, **RESNET, weights=str(tmp_path / "resnet18.pth"))
    with pytest.raises(ConfigError, match="not a readable state dict"):
        models.ResNet18((3, 32, 32), 10, **options, weights=str(tmp_path / "none.pth"))


def test_resnet_block_by_hand():
    """With its last scale at zero a block is the ReLU of its shortcut."""
    model = models.ResNet18((3, 8, 8), 4, **RESNET)
    block = model.blocks[0]
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: models.LeNet((1, 8, 8), 10), "at least 16x16.*model=mlp"),
        (lambda: models.CNN((13,), 2), "needs images"),
        (lambda: models.CharLSTM((1, 8, 8), 10, **LSTM), "data=shakespeare"),
        (lambda: models.ResNet18((3, 32, 32), 10, **RESNET | {"norm": "layer"}), "'group' or 'batch'"),
        (lambda: models.ResNet18((3, 32, 32), 10, **RESNET | {"groups": 3}), "does not divide 64"),
        (lambda: models.ResNet18((3, 32, 32), 10, **RESNET | {"stem": "tiny"}), "'imagenet'"),
    ],
)
def test_impossible_models_are_refused(build, words):
    with pytest.raises(ConfigError, match=words):
        build()


@pytest.mark.parametrize(
    ("columns", "quantiles", "outputs"), [((), [], 1), ((3,), [], 3), ((1,), [0.1, 0.9], 2)]
)
def test_configured_models_have_an_output_for_each_number(
    columns: tuple[int, ...], quantiles: list[float], outputs: int
) -> None:
    config = compose_quickly(("model=linear",))
    config.task = {"loss": "quantile", "quantiles": quantiles} if quantiles else None
    data = Dataset(Samples(torch.zeros(8, 4), torch.zeros(8, *columns)))
    assert initial.model(config, data, None)(torch.zeros(2, 4)).shape == (2, outputs)

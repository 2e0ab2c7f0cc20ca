"""Distances of sets of images, with a stand-in for the network of torch-fidelity."""

from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import fid
from conftest import needs, save_generator, tiny_generator, write_folder


def distance(a, b):
    return fid.frechet_distance(*fid.gaussian(a), *fid.gaussian(b))


def test_frechet_distance_of_known_gaussians():
    mean_a, mean_b = torch.tensor([[1.0, 2.0], [0.0, 4.0]]).double()
    cov_a, cov_b = torch.tensor([[[2.0, 0.6], [0.6, 1.0]], [[1.0, -0.3], [-0.3, 3.0]]]).double()
    val, vec = torch.linalg.eig(cov_a @ cov_b)  # the definition, not symmetrised
    root = (vec @ torch.diag(val.sqrt()) @ torch.linalg.inv(vec)).real
    exact = (5 + cov_a.trace() + cov_b.trace() - 2 * root.trace()).item()
    assert fid.frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(exact, rel=1e-9)
    few = torch.randn(10, 50)  # singular
    assert abs(distance(few, few)) < 1e-4 and distance(few, few + 1) == pytest.approx(50, rel=1e-5)


def test_scores_of_constructed_images():
    images, labels, _ = data.load("digits")
    (a, b), (a_labels, b_labels) = data.to_float(images[:1600]).chunk(2), labels[:1600].chunk(2)
    real = fid.scores(a, a_labels, b, b_labels)
    assert real["acc"] > 0.9 and fid.copies(a, b) < 0.02
    assert real["fd"] == pytest.approx(distance(a.flatten(1), b.flatten(1)), rel=1e-6)
    for shift, share in ((1 / 20, 1), (1 / 10, 0)):  # a copy is within 1/16
        assert fid.copies(b + shift, b) == share
    noise = fid.scores(torch.rand_like(a) * 2 - 1, a_labels, b, b_labels)
    assert noise["acc"] < 0.3 and noise["fd"] > 5 * real["fd"]
    one = torch.stack([b[b_labels == k][0] for k in range(10)]).repeat(10, 1, 1, 1)
    assert fid.scores(one, torch.arange(10).repeat(10), b, b_labels)["std"] == 0 < real["std"]


def test_sets(tmp_path):
    args = Namespace(n=7, cfg=1.0, data_dir=tmp_path / "cache", device="cpu")
    save_generator(tiny_generator(), tmp_path / "a.pt", list("0123456789"))
    write_folder(tmp_path / "pets")  # of 40 x 30 pixels, 41 x 30, ...
    np.savez(tmp_path / "a.npz", arr_0=np.arange(9, dtype=np.uint8).repeat(64).reshape(9, 8, 8, 1))
    for name, size in (("a.pt", 8), ("pets", 30), ("a.npz", 8)):
        found = fid.load_set(str(tmp_path / name), args, 7)
        assert found.shape == (7, 3, size, size) and found.dtype == torch.uint8
        assert torch.equal(found, fid.load_set(str(tmp_path / name), args, 7))
    shades = found[:, 0, 0, 0].tolist()
    assert len(set(shades)) == 7 and shades != sorted(shades)  # some, not the first


def pool(images):
    return F.adaptive_avg_pool2d(images / 255, 2).flatten(1)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    torch_fidelity = needs("torch_fidelity")

    class StandIn(torch_fidelity.FeatureExtractorBase):
        get_provided_features_list = staticmethod(lambda: ("pooled",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "pooled")

        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        def forward(self, images):
            return (pool(images),)

    torch_fidelity.register_feature_extractor("stand-in", StandIn)
    cache = str(tmp_path_factory.mktemp("cache"))
    return ["--network", "stand-in", "--device", "cpu", "--data_dir", cache]


def test_fid_of_two_sets(tmp_path, flags, capsys):
    a, b = np.random.randint(0, 256, (2, 40, 8, 8, 3), np.uint8)
    fa, fb = (pool(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (a, b))
    np.savez(tmp_path / "a.npz", arr_0=a)
    np.savez(tmp_path / "b.npz", arr_0=b)
    fid.main([f"{tmp_path}/a.npz", f"{tmp_path}/b.npz", *flags])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f"FID-40: 40 images against {tmp_path}/b.npz, at 8 pixels"
    assert f"frechet_inception_distance       {distance(fa, fb):.4g}" in lines

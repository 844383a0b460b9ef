"""The five planted effects: known sizes, known places, frequencies in the claimed order, labels that are fair."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import FULL
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest
from sklearn.metrics import roc_auc_score

from brainscale.geometry import voxel_to_mm
from brainscale.settings import InputError
from brainscale_data_prep import anatomy, effect_report, effects, phantom, scanners, severity, tables
from brainscale_data_prep.anatomy import Subject, Template
from brainscale_data_prep.severity import NUM_REGIONS, SEPARATION, TASKS

SITES = tuple(scanners.SITES)


@pytest.fixture(scope="module")
def template() -> Template:
    return phantom.load_template(2, head=False)


def changed_mm(template: Template, subject: Subject, task: str, contrast: str = "T1w") -> tuple[np.ndarray, np.ndarray]:
    """Template mm (n,3) of the painted voxels that a severity of 2 changes from one of 0, and by how much (n,)."""
    ill, healthy = (anatomy.paint(template, subject.at(task, value), contrast) for value in (2.0, 0.0))
    places = np.argwhere(ill != healthy)
    return voxel_to_mm(template.affine, places), (ill - healthy)[tuple(places.T)]


# --------------------------------------------------------------------------------------------- who is how ill


def people(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (n,5), severities (n,5) and region severities (n,12)."""
    labels, severities, regions = [], [], []
    for number in range(1, count + 1):
        drawn = severity.draw_labels(seed, number, TASKS)
        severe, parts = severity.draw_severities(seed, number, drawn)
        labels.append([drawn[task] for task in TASKS])
        severities.append([severe[task] for task in TASKS])
        regions.append(parts)
    return np.array(labels), np.array(severities), np.array(regions)


@given(st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_every_eight_subjects_hold_each_pair_of_labels_twice(seed: int, block: int) -> None:
    labels = np.array(
        [list(severity.draw_labels(seed, number, TASKS).values()) for number in range(8 * block + 1, 8 * block + 9)]
    )
    for one, other in combinations(labels.T, 2):
        assert np.bincount(2 * one + other, minlength=4).tolist() == [2, 2, 2, 2]


def test_three_labels_together_are_independent_over_blocks() -> None:
    labels = people(1600)[0]
    for three in combinations(range(5), 3):
        counts = np.bincount(labels[:, three] @ [4, 2, 1], minlength=8)
        assert (abs(counts - 200) < 70).all(), counts


def test_severities_have_the_stated_size_and_the_oracle_the_stated_auroc() -> None:
    labels, severities, regions = people(4000)
    for task, label, value in zip(TASKS, labels.T, severities.T):
        within = value - SEPARATION * (label - 0.5)
        assert kstest(within, "norm").pvalue > 1e-3, task
        assert abs(roc_auc_score(label, value) - 0.85) < 0.02, task
    noise = severities - SEPARATION * (labels - 0.5)
    assert np.abs(np.corrcoef(noise.T) - np.eye(5)).max() < 0.06
    ill = labels[:, TASKS.index("distributed")]
    alone = [roc_auc_score(ill, part) for part in regions.T]
    assert 0.57 < min(alone) and max(alone) < 0.67
    assert np.abs(np.corrcoef((regions - SEPARATION * (ill[:, None] - 0.5) / np.sqrt(12)).T) - np.eye(12)).max() < 0.07


def test_the_oracle_is_sklearns_auroc_and_its_interval_covers() -> None:
    rng, covered, trials = np.random.default_rng(0), 0, 2000 if FULL else 400
    for _ in range(trials):
        label = np.repeat([0, 1], 20)
        found = severity.oracle(label.tolist(), (rng.standard_normal(40) + SEPARATION * label).tolist())
        covered += found.low <= 0.85 <= found.high
    value = rng.standard_normal(40)
    assert severity.oracle(label.tolist(), value.tolist()).auroc == pytest.approx(roc_auc_score(label, value))
    assert 0.92 < covered / trials < 0.99
    perfect = severity.oracle([0, 0, 1, 1], [0.0, 1, 2, 3])
    assert perfect.auroc == perfect.high == 1 and 0.2 < perfect.low < 0.9
    assert np.isnan(severity.oracle([1, 1], [0.0, 1]).auroc)


@pytest.mark.parametrize(
    "size",
    [
        effects.ventricle_widening,
        lambda z: effects.hippocampus_loss(0.5, z, 0.0),
        effects.lesion_load,
        effects.mass_radius_mm,
        lambda z: -effects.boundary_detail(z),
        lambda z: effects.region_losses(np.array([z]))[0],
    ],
)
def test_sizes_rise_with_severity_without_end(size) -> None:
    sizes = [size(z) for z in np.linspace(-6, 6, 200)]
    assert (np.diff(sizes) > 0).all()


def test_most_healthy_subjects_have_next_to_no_mass_and_most_ill_ones_have_one() -> None:
    radii = [[effects.mass_radius_mm(side * SEPARATION / 2 + z) for z in (0, 1)] for side in (-1, 1)]
    assert radii[0][0] < 2 and radii[0][1] < 5 and radii[1][0] > 5 and radii[1][1] > 9


# --------------------------------------------------------------------------------------------- confounds


def test_site_follows_one_label_when_asked_and_nothing_else_changes() -> None:
    confound = severity.parse_confound("label_mass=0.8")
    for number in (1, 2):
        one, other = (anatomy.draw_subject(4, number, SITES, wanted) for wanted in (None, confound))
        assert (one.labels, one.age, one.sex, one.severities) == (other.labels, other.age, other.sex, other.severities)
        np.testing.assert_array_equal(one.displacement_mm, other.displacement_mm)
    labels, last, others = people(400)[0], [], set()
    for number, drawn in enumerate(labels, start=1):
        by_task = dict(zip(TASKS, drawn.tolist()))
        site = severity.confounded_site(0, number, by_task, confound, "here", SITES)
        last.append(np.nan if site == "here" else site == SITES[-1])
        others.add(site)
    free = np.isnan(last)
    assert 0.14 < free.mean() < 0.26 and others == {"here", *SITES}
    np.testing.assert_array_equal(np.array(last)[~free], labels[~free, TASKS.index("mass")])
    for task in set(TASKS) - {"mass"}:
        assert abs(roc_auc_score(labels[~free, TASKS.index(task)], np.array(last)[~free]) - 0.5) < 0.12


@pytest.mark.parametrize("text", ["label_mass", "mass=0.5", "label_mass=2", "label_mass=x", "label_age=0.5"])
def test_confounds_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="LABEL=STRENGTH"):
        severity.parse_confound(text)


# --------------------------------------------------------------------------------------------- where effects lie


def test_lesions_are_small_dark_in_t1w_bright_elsewhere_and_in_white_matter(template: Template) -> None:
    (x, *yz), spread_mm = np.array(effects.LESIONS_MM[0]), np.array(effects.LESIONS_MM[1])
    for number in (1, 2):
        subject = anatomy.draw_subject(7, number, SITES)
        for contrast, sign in (("T1w", -1), ("T2w", 1), ("FLAIR", 1), ("PDw", 1)):
            places, change = changed_mm(template, subject, "lesions", contrast)
            beyond = (np.abs(places * [0, 1, 1] + [[0, 0, 0]] - [0, *yz]) - 2 * spread_mm)[:, 1:]
            assert beyond.max() < effects.LESION_RADIUS_MM[1] + 2 and np.abs(np.abs(places[:, 0]) - x).max() < 16
            assert (np.sign(change) == sign).mean() > 0.95
        volume_mm3 = 8 * len(places)
        assert 100 < volume_mm3 < 3000
        centres = effects.lesion_places(template.white_xyz(), template.affine, subject.lesion_draws_mm, 24.0)
        assert len(centres) == effects.MOST_LESIONS
        for centre_mm, _ in centres:
            voxel = np.rint((centre_mm - template.affine[:3, 3]) / 2).astype(int)
            assert template.white_xyz()[tuple(voxel)] >= effects.LEAST_WHITE


def test_sharpness_changes_the_cortex_alone_and_its_detail_falls_with_severity(template: Template) -> None:
    subject = anatomy.draw_subject(7, 1, SITES)
    places, change = changed_mm(template, subject, "sharpness")
    centre_mm, half_mm = np.array(effects.DEEP_MM)
    assert (np.linalg.norm((places - centre_mm) / half_mm, axis=1) > 1).all()
    behind, below = effects.BELOW_MM
    assert not ((places[:, 1] < behind) & (places[:, 2] < below)).any()
    assert abs(change.mean()) < 0.15 * np.abs(change).mean()  # neither brighter nor darker
    sharp = [
        np.abs(np.diff(anatomy.paint(template, subject.at("sharpness", value), "T1w"), axis=0)).mean()
        for value in (-2.0, 0.0, 2.0)
    ]
    assert sharp[0] > 1.02 * sharp[1] > 1.02 * sharp[2]


def test_atrophy_and_the_pattern_lie_in_their_regions(template: Template) -> None:
    subject = anatomy.draw_subject(7, 1, SITES)

    def nearest(places: np.ndarray, regions: list[tuple[effects.Mm, effects.Mm]]) -> np.ndarray:
        return np.min([np.linalg.norm((places - centre) / np.array(std), axis=1) for centre, std in regions], axis=0)

    x, y, z = effects.HIPPOCAMPUS_MM[0]
    both = [((side * x, y, z), effects.HIPPOCAMPUS_MM[1]) for side in (-1, 1)]
    for task, regions in (
        ("atrophy", [*both, effects.VENTRICLES_MM]),
        ("distributed", [(centre, effects.REGION_STD_MM) for centre in effects.REGIONS_MM]),
    ):
        places, change = changed_mm(template, subject, task)
        far = nearest(places, regions)
        assert (change[far < 2] ** 2).sum() > 0.95 * (change**2).sum(), task
        assert change.sum() < 0 and np.abs(change[far > 4]).max() < 0.01, task  # T1w grows darker


def test_regions_of_the_pattern_change_one_by_one(template: Template) -> None:
    subject = replace(anatomy.draw_subject(7, 1, SITES), region_severities=np.zeros(NUM_REGIONS))
    base = anatomy.paint(template, subject, "T1w")
    for region in (0, 7):
        parts = np.zeros(NUM_REGIONS)
        parts[region] = 2
        change = np.abs(anatomy.paint(template, replace(subject, region_severities=parts), "T1w") - base)
        centre_mm = voxel_to_mm(template.affine, np.argwhere(change > 0)).T @ change[change > 0] / change.sum()
        assert np.linalg.norm(centre_mm - effects.REGIONS_MM[region]) < 6


def test_mass_and_oedema_differ_push_and_are_where_the_subject_has_them(template: Template) -> None:
    subject = replace(anatomy.draw_subject(7, 1, SITES), mass_mm=np.array([32.0, -12.0, 26.0])).at("lesions", -9.0)
    ill = subject.at("mass", 2.5)
    radius_mm = (1 - effects.MASS_PUSH) * effects.mass_radius_mm(2.5)
    x, y, z = (template.axes_mm()[k] for k in range(3))
    distance_mm = np.sqrt((x[:, None, None] - 32) ** 2 + (y[:, None] + 12) ** 2 + (z - 26) ** 2)
    shell = (distance_mm > radius_mm + 1.5) & (distance_mm < effects.OEDEMA_RADII * radius_mm - 1.5)
    white = template.white_xyz() > 0.9
    for contrast, look in anatomy.INTENSITIES.items():
        painted, healthy = (anatomy.paint(template, s, contrast) for s in (ill, subject.at("mass", -9.0)))
        gain = 1 + anatomy.RIGHT_GAIN_FRACTION * np.tanh(32 / anatomy.MIDLINE_MM)
        assert np.median(painted[distance_mm < radius_mm - 2]) == pytest.approx(look.mass * gain, rel=0.02)
        seen, before = np.median(painted[shell & white]), np.median(healthy[shell & white])
        assert abs(seen - look.oedema * gain) < 0.35 * abs(before - look.oedema * gain)
        outside = distance_mm > effects.OEDEMA_RADII * radius_mm + 1.5
        np.testing.assert_array_equal(painted[outside], healthy[outside])
    # seen from outside, tissue that lay at the edge of the mass has moved away from its centre
    world = np.linalg.inv(subject.to_template) @ [32, -12, 26, 1]
    along = world[:3] + np.outer(np.linspace(0, 40, 400), [0.6, 0.8, 0])
    still = {"displacement_mm": 0 * subject.displacement_mm}
    mapped = [anatomy.world_to_template(replace(s, **still), along) for s in (subject.at("mass", -9.0), ill)]
    reach = [np.linalg.norm(points - [32, -12, 26], axis=1) for points in mapped]
    assert (reach[1][20:] <= reach[0][20:] + 1e-6).all() and (reach[0] - reach[1]).max() > 1


# --------------------------------------------------------------------------------------------- spectra


def test_the_spectrum_of_a_wave_is_its_frequency_whatever_the_voxels() -> None:
    x = 0.9 * np.arange(60)
    wave = np.broadcast_to(np.sin(2 * np.pi * x / 9)[:, None, None], (60, 8, 9)).copy()
    found = effect_report.radial_spectrum([wave], (0.9, 1.0, 2.0))
    assert found.centroid_per_mm == pytest.approx(1 / 9, rel=1e-6) and found.shares.max() > 0.999
    assert found.frequencies_per_mm[found.shares.argmax()] == pytest.approx(1 / 9, abs=0.25 / effect_report.BINS)
    with pytest.raises(ValueError):
        effect_report.radial_spectrum([np.zeros((4, 4, 4))], (1, 1, 1))


def test_waves_of_equal_energy_count_equally_along_any_axis() -> None:
    x, z = np.arange(24)[:, None, None], np.arange(24)
    waves = np.cos(2 * np.pi * x / 12) + np.cos(2 * np.pi * z / 4) + np.zeros((24, 5, 24))
    found = effect_report.radial_spectrum([waves], (1, 1, 1))
    assert found.centroid_per_mm == pytest.approx((1 / 12 + 1 / 4) / 2, rel=1e-6)


def test_energy_is_that_of_white_noise_per_shell() -> None:
    found = effect_report.radial_spectrum([np.random.default_rng(0).standard_normal((48, 48, 47))], (1, 1, 1))
    edges = np.linspace(0, 1, effect_report.BINS + 1)
    np.testing.assert_allclose(found.shares[8:], np.diff(edges**3)[8:], rtol=0.08)
    assert found.centroid_per_mm == pytest.approx(0.375, rel=0.01)  # ¾ of the highest frequency


def test_frequencies_are_in_the_claimed_order(template: Template) -> None:
    found = effect_report.spectra(template, 0, "T1w", subjects=3 if FULL else 1)
    centroid = {task: spectrum.centroid_per_mm for task, spectrum in found.items()}
    assert max(centroid["atrophy"], centroid["distributed"]) < 0.045
    assert 0.06 < centroid["mass"] < min(centroid["lesions"], centroid["sharpness"])
    assert min(centroid["lesions"], centroid["sharpness"]) > 0.1


@pytest.mark.slow
def test_the_report_says_oracle_places_and_spectra(tmp_path: Path) -> None:
    phantom.make(tmp_path / "bids", 8, seed=3, spacing_mm=8.0, report=True, confound="label_mass=1.0")
    about = json.loads((tmp_path / "bids/effects.json").read_text())
    truth = tables.read(tmp_path / "bids/truth.tsv")
    rows = tables.read(tmp_path / "bids/participants.tsv")
    assert (tmp_path / "bids/effects.png").read_bytes()[:4] == b"\x89PNG"
    assert set(about["Tasks"]) == set(TASKS)
    for task, said in about["Tasks"].items():
        label = [int(row[f"label_{task}"]) for row in rows]
        auroc = roc_auc_score(label, [float(row[f"severity_{task}"]) for row in truth])
        assert said["OracleAuroc"] == 0.85 and said["CohortAuroc"]["auroc"] == pytest.approx(auroc, abs=1e-4)
        assert sum(said["Spectrum"]["T1w"]["EnergyShare"]) == pytest.approx(1, abs=1e-3)
    assert all((row["site"] == SITES[-1]) == (row["label_mass"] == "1") for row in rows)
    columns = json.loads((tmp_path / "bids/participants.json").read_text())
    assert "label_mass" in columns["site"]["Description"]
    assert not any(name.startswith("severity") for name in rows[0])

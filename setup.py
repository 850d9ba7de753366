"""Installation reads everything from settings.ini, the file that nbdev itself reads."""
from configparser import ConfigParser

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], license="Apache-2.0",
    description=cfg["description"], author=cfg["author"], author_email=cfg["author_email"],
    keywords=cfg["keywords"], url=cfg["git_url"],
    packages=find_packages(include=["cxrkit", "cxrkit.*"]), include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "License :: OSI Approved :: Apache Software License", "Programming Language :: Python :: 3"],
    zip_safe=False,
)

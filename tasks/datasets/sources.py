"""Where the published data sets are fetched from: the one table of addresses, digests and bounds.

Addresses are replaced by ``--from`` (archive) and ``--lists`` (folder of the lists), so a mirror or a file on disk
serves as well: what arrives is checked by digest, not by where it came from.
"""

from dataclasses import dataclass

GIGABYTE = 10**9
LISTS = "https://raw.githubusercontent.com/xyutao/fscil/master/data/index_list"


@dataclass(frozen=True)
class Source:
    """Where one data set comes from.

    Attributes:
        archive: Address of the archive; None where the terms of the pictures let nobody pass them on.
        md5: Published digest of the archive; None where there is none.
        lists: Address of the folder of the session lists.
        unpacked: Bound on what the archive unpacks to, in bytes.
        members: Bound on the number of files in it.
        terms: What the data set's authors ask for.
    """

    archive: str | None
    md5: str | None
    lists: str
    unpacked: int
    members: int
    terms: str


SOURCES = {
    "cub200": Source(
        archive="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        md5="97eceeb196236b17998738112f37df78",
        lists=f"{LISTS}/cub200",
        unpacked=4 * GIGABYTE,
        members=50_000,
        terms="CUB-200-2011 is for non-commercial research and education; its photographs belong to their authors",
    ),
    "cifar100": Source(
        archive="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        lists=f"{LISTS}/cifar100",
        unpacked=GIGABYTE,
        members=100,
        terms="cite Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    ),
    "miniimagenet": Source(
        archive=None,
        md5=None,
        lists=f"{LISTS}/mini_imagenet",
        unpacked=20 * GIGABYTE,
        members=200_000,
        terms="miniImageNet's pictures are ImageNet's: for non-commercial research, by ImageNet's terms of access",
    ),
}

"""The published session lists (Tao et al., CVPR 2020): how many sessions, and the sha256 of every list.

``session_<n>.txt`` names the training pictures of session n (from 1), ``test_<n>.txt`` the test pictures of the
classes that are new in it. One picture a line: a path, or for CIFAR-100 an index into the official order. The
lists are data of their authors: fetched with the pictures, never part of the project.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tasks.datasets.settings import DatasetError

K_SHOT = 5
"""Training pictures of each new class, in all three data sets."""


@dataclass(frozen=True)
class Lists:
    """One data set's lists.

    Attributes:
        n_base: Classes of the base session.
        n_way: New classes of each later session.
        n_sessions: Sessions after the base session.
        digests: sha256 by file name.
    """

    n_base: int
    n_way: int
    n_sessions: int
    digests: dict[str, str]


def read_lists(name: str, folder: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Read the training and the test lists of ``PUBLISHED[name]``, one list of lines for each session.

    Raises:
        DatasetError: A list is missing or is not the published one.
    """
    known = PUBLISHED[name]
    texts = {file: _verified(name, folder / file, digest) for file, digest in known.digests.items()}
    sessions = range(1, known.n_sessions + 2)
    train, test = ([texts[f"{kind}_{n}.txt"].split() for n in sessions] for kind in ("session", "test"))
    return train, test


def _verified(name: str, path: Path, digest: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"no session list {path}: run `make data DATASET={name}`, or name the folder that holds "
            f"session_1.txt, test_1.txt and so on with dataset.splits="
        ) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise DatasetError(
            f"{path} is not the published list (its sha256 does not begin with {digest[:12]}): remove it and run "
            f"`make data DATASET={name}`; for a split of your own use dataset=imagefolder"
        )
    return content.decode()


PUBLISHED = {
    "cub200": Lists(
        n_base=100,
        n_way=10,
        n_sessions=10,
        digests={
            "session_1.txt": "51ac011fc2cf87c374350a70ca9fbe210eb10f406b24b6675e2e143586ca24fc",
            "session_2.txt": "24d1ebea2ff962c13475ad7aa660c1e6cbeb8ecca053d82d22fabc7e7a323400",
            "session_3.txt": "531b4cdc44b54d18059ed7f2a758fc22a55ea2f3eb0b814b38a508e6ea3fb371",
            "session_4.txt": "b0415d1fe51d8b9216f0097fdc73817b7813b5b5c8a3e2fbaf43131abff4becf",
            "session_5.txt": "44e4ae53379abbf93767bc4937c36eb2e72d1741875805128f1bfee1fa6093a8",
            "session_6.txt": "dd2ac89166e698b316e24b4cbff025c5aaaf517712b94f63930127785010af3c",
            "session_7.txt": "ee5985b9b76466d368116cf25bce2ba994d9b0d4a79ac4e9055cffaff1771aa3",
            "session_8.txt": "aebaffe49fa56c8a4e4bdaa1ad2d7bb9f54647369a2985f57779c5ce18b4230d",
            "session_9.txt": "69e3c194ea2d48cf2a99a7223ca094d14a3d34f308985def22587f324f3b24dc",
            "session_10.txt": "6f669352b66fecfb9b001263e9c7a47487a65f244ad5676d0790b06b55de6db4",
            "session_11.txt": "fd3ceecd3e52d9c8f646bab41e3562d0f545c8746618fc5693ff85681a0506c1",
            "test_1.txt": "9d0d2656b277beaa863186b0aecceebae5071c930dd39f2457e3981146d0f922",
            "test_2.txt": "921e0b633aea5b42f11c08e9b55793e44f200b79f06ee815a8dac0bbfce39483",
            "test_3.txt": "0c056d96d69dfb51c82421cde18db076b763ce1d262f7dfb9f6cf281e150c333",
            "test_4.txt": "3b587e38516d5e940386770c9cb501c4c77b8cb12023b7f21949096a2200bea4",
            "test_5.txt": "6d198ee1739396a45e92711fd199c204bcb6ae1e18393dd5fe9ff501220ce90c",
            "test_6.txt": "a0f048f1d7f76a8e4f2badeeb2aa7e6b3f9a58c38bbc7f8b2816395735818abf",
            "test_7.txt": "ad3c01197e1dc6d7ef252dfca3b07726b16580486584a4932f931aebf0a34c3f",
            "test_8.txt": "65f9ea9fcb3dd35703f34a1d4ab715696ccf845ee08bbf798db7efed98f8aa5f",
            "test_9.txt": "94e1fa173d01ba12abc73741b3cbced272cab782b825174300c513de91403e5c",
            "test_10.txt": "d1faab3b4445a75fb52d987a4df1f457566890a3759cdf615037d67b2df93803",
            "test_11.txt": "d80047f95618926a7602ddb9af30ad058bbe9b53ee872b60c2d4ac67018d6d60",
        },
    ),
    "cifar100": Lists(
        n_base=60,
        n_way=5,
        n_sessions=8,
        digests={
            "session_1.txt": "5f402fb2c5260a05bb02ea000f9b9e32f23e305281969afa6ea47a9a22b69cf7",
            "session_2.txt": "654db7b72e383a1aac94a4e570ea26c9f3cb8b7bf95a7aff2a9e1626f4e0b330",
            "session_3.txt": "a466c0f920549096435c9b298e9f52f2b4a676db34f2c54de04f4147759a2eea",
            "session_4.txt": "c2d0f0a6db516358055d448b1dd8033a778ae7ba30de78adbd8ea2e1b94282b0",
            "session_5.txt": "2907fe7d341f9f4da0c2cdf59bcf33a50619f41e9ebd3232fe2c6c11bc30bfa4",
            "session_6.txt": "87f70d04e01acb3ba0bbce24f84bf78ee905721d3609e53c5f11bf92d3237197",
            "session_7.txt": "70131153942c3a30418843097a482d0e24dedbaa394876b101db205a5099a595",
            "session_8.txt": "8bcefabac5ff2d3086e3cc097b306713661f07aa670ef3935570226293e1c2f1",
            "session_9.txt": "242fd41330db6081d11216a8324f92aebd64545b2171bd567a162a7521a62ed7",
            "test_1.txt": "fb1cab9c3b259be07af15e7bc686def5229a2eaea1b1e4979480a137c65a56b2",
            "test_2.txt": "fa145992e52fa64c1fda9b1d4b8c9728d98b95fd6b0bf070146226d9e1f9554f",
            "test_3.txt": "e9026a1b80add0ad61dfb2cac317207823971abff0270e5137007ba1316fa38a",
            "test_4.txt": "e33ca1b5c88069888d79199c3bb672cf5237db34873b87377e7ee3102637dbd4",
            "test_5.txt": "5b1e72284cf9967d688713c6abee14bd97773c97173bf079d6742ee522fad067",
            "test_6.txt": "be217c48c02602198662a7b4174f411ad95aa60b7dcfc2267b176a76a573ec8a",
            "test_7.txt": "9012569565facdd59d3b35ff9b8659f21057caa39476678e16e8d1df041734ae",
            "test_8.txt": "0e436d1579b36fefcaed265e9071c246d422a0982cd5b3888fc904856bd85e4c",
            "test_9.txt": "72c96c2fe83200a37f9d9d2f8d16292965832f5b72fefe9a2e50860c6f9df8c2",
        },
    ),
    "miniimagenet": Lists(
        n_base=60,
        n_way=5,
        n_sessions=8,
        digests={
            "session_1.txt": "af28c169b628923284b9905238a90a97b4a95949f66dd04f2853467a16e090a3",
            "session_2.txt": "0ca2664ee5be9852f7688e9f691397ba9ac23333b64afcbbb20012a22adee16a",
            "session_3.txt": "7a2b2d26f529247dc725d406125eab2a698523d8c669cd1e399c26d068e6d6fa",
            "session_4.txt": "e70403ced5ac32b811962cdb498b0e01bb4444da0d20539f6f183db17fe158c2",
            "session_5.txt": "4b8aa1d08d1a0aa2a2ed6baefc3aa2e801ea0a6924a8056ca4c4737d60ac0460",
            "session_6.txt": "c78365d507400f170186bc321bfa233dde1160c6df6405fba242dedda59d3070",
            "session_7.txt": "ad01e6e88f92b8dbcfa38831051f41a2639b2f455695bd2bb5db5cd1129ef88a",
            "session_8.txt": "ab39d572974acdd3e542040f3cd18b72a0fc97980f754b9335f99ca3df7f1847",
            "session_9.txt": "e808c65f6e081f5b0061cc4a8bdec51dff4ae99cb37193d239a319e388ec1226",
            "test_1.txt": "cbf33dd8b9098c1dab360c0fc780a0275b49533fb3a22e1bd35f040f421aad7e",
            "test_2.txt": "de178c86cac131724c6457eac0a088fab8f7972b42da1e8a2df3199ffe7dc71a",
            "test_3.txt": "bf629b2eacbd556141654449355dac7d04b4382ab3fd23d20f40f466db812dfa",
            "test_4.txt": "ed6935aefbbd4655e66386fc7e2014437075f49cd61df8879e28180e5f127931",
            "test_5.txt": "3193c82c12f9a2194afe4071406494924efc6d816b7d144607f851f7dfdf2f82",
            "test_6.txt": "888ab89336e28f277aa99f9b55be9492407b79e030f9579f6248af07f2242c00",
            "test_7.txt": "c567058658d1c16525ac1a9a70b9481fb2a5a2155c31682014b1fde4e039a1f6",
            "test_8.txt": "660f6af5fea4ca4023aea9706fba79992c10d444057f63d849910c388857f775",
            "test_9.txt": "2cd080af6dccc19951335233a5f22770d83d7d656d68fa9405a26760bb8c0026",
        },
    ),
}

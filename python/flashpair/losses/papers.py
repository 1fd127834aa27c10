"""The papers that the losses come from, by a short name each."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """A paper.

    Attributes:
        title: its title.
        authors: "Family, Given" of each, in order.
        year: of publication.
        venue: where it appeared; empty: as a preprint alone.
        arxiv: its number there, or empty.
    """

    title: str
    authors: tuple[str, ...]
    year: int
    venue: str = ""
    arxiv: str = ""

    @property
    def short(self) -> str:
        """As a text cites it: "Sohn 2016", "Yu and Tao 2019", "Wang et al. 2019"."""
        families = [author.partition(",")[0] for author in self.authors]
        names = " and ".join(families) if len(families) < 3 else f"{families[0]} et al."
        return f"{names} {self.year}"


WANG_2019 = Paper(
    "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning",
    ("Wang, Xun", "Han, Xintong", "Huang, Weilin", "Dong, Dengke", "Scott, Matthew R."),
    2019,
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
    arxiv="1904.06627",
)
SOHN_2016 = Paper(
    "Improved Deep Metric Learning with Multi-class N-pair Loss Objective",
    ("Sohn, Kihyuk",),
    2016,
    "Advances in Neural Information Processing Systems 29 (NIPS)",
)
OH_SONG_2016 = Paper(
    "Deep Metric Learning via Lifted Structured Feature Embedding",
    ("Oh Song, Hyun", "Xiang, Yu", "Jegelka, Stefanie", "Savarese, Silvio"),
    2016,
    "IEEE Conference on Computer Vision and Pattern Recognition (CVPR)",
    arxiv="1511.06452",
)
HERMANS_2017 = Paper(
    "In Defense of the Triplet Loss for Person Re-Identification",
    ("Hermans, Alexander", "Beyer, Lucas", "Leibe, Bastian"),
    2017,
    arxiv="1703.07737",
)
HADSELL_2006 = Paper(
    "Dimensionality Reduction by Learning an Invariant Mapping",
    ("Hadsell, Raia", "Chopra, Sumit", "LeCun, Yann"),
    2006,
    "IEEE Computer Society Conference on Computer Vision and Pattern Recognition (CVPR)",
)
YUAN_2019 = Paper(
    "Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning",
    ("Yuan, Tongtong", "Deng, Weihong", "Tang, Jian", "Tang, Yinan", "Chen, Binghui"),
    2019,
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
)
YI_2014 = Paper(
    "Deep Metric Learning for Practical Person Re-Identification",
    ("Yi, Dong", "Lei, Zhen", "Li, Stan Z."),
    2014,
    arxiv="1407.4979",
)
GOLDBERGER_2004 = Paper(
    "Neighbourhood Components Analysis",
    ("Goldberger, Jacob", "Roweis, Sam", "Hinton, Geoffrey", "Salakhutdinov, Ruslan"),
    2004,
    "Advances in Neural Information Processing Systems 17 (NIPS)",
)
CHEN_2020 = Paper(
    "A Simple Framework for Contrastive Learning of Visual Representations",
    ("Chen, Ting", "Kornblith, Simon", "Norouzi, Mohammad", "Hinton, Geoffrey"),
    2020,
    "International Conference on Machine Learning (ICML)",
)
KHOSLA_2020 = Paper(
    "Supervised Contrastive Learning",
    (
        "Khosla, Prannay",
        "Teterwak, Piotr",
        "Wang, Chen",
        "Sarna, Aaron",
        "Tian, Yonglong",
        "Isola, Phillip",
        "Maschinot, Aaron",
        "Liu, Ce",
        "Krishnan, Dilip",
    ),
    2020,
    "Advances in Neural Information Processing Systems 33 (NeurIPS)",
)
SUN_2020 = Paper(
    "Circle Loss: A Unified Perspective of Pair Similarity Optimization",
    ("Sun, Yifan", "Cheng, Changmao", "Zhang, Yuhan", "Zhang, Chi", "Zheng, Liang", "Wang, Zhongdao", "Wei, Yichen"),
    2020,
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
)
WU_2017 = Paper(
    "Sampling Matters in Deep Embedding Learning",
    ("Wu, Chao-Yuan", "Manmatha, R.", "Smola, Alexander J.", "Krähenbühl, Philipp"),
    2017,
    "IEEE International Conference on Computer Vision (ICCV)",
)
YU_2019 = Paper(
    "Deep Metric Learning with Tuplet Margin Loss",
    ("Yu, Baosheng", "Tao, Dacheng"),
    2019,
    "IEEE/CVF International Conference on Computer Vision (ICCV)",
)
SCHROFF_2015 = Paper(
    "FaceNet: A Unified Embedding for Face Recognition and Clustering",
    ("Schroff, Florian", "Kalenichenko, Dmitry", "Philbin, James"),
    2015,
    "IEEE Conference on Computer Vision and Pattern Recognition (CVPR)",
)
MUSGRAVE_2020 = Paper(
    "A Metric Learning Reality Check",
    ("Musgrave, Kevin", "Belongie, Serge", "Lim, Ser-Nam"),
    2020,
    "European Conference on Computer Vision (ECCV)",
)
WANG_2017 = Paper(
    "Deep Metric Learning with Angular Loss",
    ("Wang, Jian", "Zhou, Feng", "Wen, Shilei", "Liu, Xiao", "Lin, Yuanqing"),
    2017,
    "IEEE International Conference on Computer Vision (ICCV)",
)
USTINOVA_2016 = Paper(
    "Learning Deep Embeddings with Histogram Loss",
    ("Ustinova, Evgeniya", "Lempitsky, Victor"),
    2016,
    "Advances in Neural Information Processing Systems 29 (NIPS)",
)
CAKIR_2019 = Paper(
    "Deep Metric Learning to Rank",
    ("Cakir, Fatih", "He, Kun", "Xia, Xide", "Kulis, Brian", "Sclaroff, Stan"),
    2019,
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
)
ZHAI_2019 = Paper(
    "Classification is a Strong Baseline for Deep Metric Learning",
    ("Zhai, Andrew", "Wu, Hao-Yu"),
    2019,
    "British Machine Vision Conference (BMVC)",
)
WANG_2018 = Paper(
    "CosFace: Large Margin Cosine Loss for Deep Face Recognition",
    (
        "Wang, Hao",
        "Wang, Yitong",
        "Zhou, Zheng",
        "Ji, Xing",
        "Gong, Dihong",
        "Zhou, Jingchao",
        "Li, Zhifeng",
        "Liu, Wei",
    ),
    2018,
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
)
DENG_2019 = Paper(
    "ArcFace: Additive Angular Margin Loss for Deep Face Recognition",
    ("Deng, Jiankang", "Guo, Jia", "Xue, Niannan", "Zafeiriou, Stefanos"),
    2019,
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
)
LIU_2017 = Paper(
    "SphereFace: Deep Hypersphere Embedding for Face Recognition",
    ("Liu, Weiyang", "Wen, Yandong", "Yu, Zhiding", "Li, Ming", "Raj, Bhiksha", "Song, Le"),
    2017,
    "IEEE Conference on Computer Vision and Pattern Recognition (CVPR)",
)
MOVSHOVITZ_ATTIAS_2017 = Paper(
    "No Fuss Distance Metric Learning Using Proxies",
    ("Movshovitz-Attias, Yair", "Toshev, Alexander", "Leung, Thomas K.", "Ioffe, Sergey", "Singh, Saurabh"),
    2017,
    "IEEE International Conference on Computer Vision (ICCV)",
)
TEH_2020 = Paper(
    "ProxyNCA++: Revisiting and Revitalizing Proxy Neighborhood Component Analysis",
    ("Teh, Eu Wern", "DeVries, Terrance", "Taylor, Graham W."),
    2020,
    "European Conference on Computer Vision (ECCV)",
)
KIM_2020 = Paper(
    "Proxy Anchor Loss for Deep Metric Learning",
    ("Kim, Sungyeon", "Kim, Dongwon", "Cho, Minsu", "Kwak, Suha"),
    2020,
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
)
QIAN_2019 = Paper(
    "SoftTriple Loss: Deep Metric Learning Without Triplet Sampling",
    ("Qian, Qi", "Shang, Lei", "Sun, Baigui", "Hu, Juhua", "Li, Hao", "Jin, Rong"),
    2019,
    "IEEE/CVF International Conference on Computer Vision (ICCV)",
)
GAO_2021 = Paper(
    "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
    ("Gao, Luyu", "Zhang, Yunyi", "Han, Jiawei", "Callan, Jamie"),
    2021,
    "Proceedings of the 6th Workshop on Representation Learning for NLP (RepL4NLP)",
    arxiv="2101.06983",
)
WANG_2020 = Paper(
    "Cross-Batch Memory for Embedding Learning",
    ("Wang, Xun", "Zhang, Haozhi", "Huang, Weilin", "Scott, Matthew R."),
    2020,
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
    arxiv="1912.06798",
)

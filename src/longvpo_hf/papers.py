"""BibTeX of the papers whose methods and losses this package implements."""

LONGVPO = """\
@inproceedings{huang2025longvpo,
    title     = {{LongVPO: From Anchored Cues to Self-Reasoning for Long-Form Video Preference Optimization}},
    author    = {Zhenpeng Huang and Jiaqi Li and Zihan Jia and Xinhao Li and Desen Meng and Lingxue Song and Xi Chen and
                 Liang Li and Limin Wang},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = {2025},
    url       = {https://arxiv.org/abs/2602.02341}
}"""

TPO = """\
@article{li2025temporal,
    title   = {{Temporal Preference Optimization for Long-Form Video Understanding}},
    author  = {Rui Li and Xiaohan Wang and Yuhui Zhang and Orr Zohar and Zeyu Wang and Serena Yeung-Levy},
    journal = {arXiv preprint arXiv:2501.13919},
    year    = {2025},
    url     = {https://arxiv.org/abs/2501.13919}
}"""

TRL = """\
@software{vonwerra2020trl,
    title   = {{TRL: Transformers Reinforcement Learning}},
    author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
               Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
    license = {Apache-2.0},
    url     = {https://github.com/huggingface/trl},
    year    = {2020}
}"""

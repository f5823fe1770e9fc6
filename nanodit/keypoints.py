"""The joints of a person, in the order of COCO-WholeBody (Jin et al. 2020), which DWPose and the datasets keep."""

JOINTS = 133  # 17 of the body, 6 of the feet, 68 of the face, 21 of the left hand, 21 of the right hand
BODY_JOINTS = 17  # the first ones, in COCO's own order
# pairs of them to draw a line between: limbs, trunk, head
BONES = (
    *((5, 7), (7, 9), (6, 8), (8, 10), (11, 13), (13, 15), (12, 14), (14, 16)),
    *((5, 6), (11, 12), (5, 11), (6, 12), (0, 1), (0, 2), (1, 3), (2, 4)),
)

"""The 54 faults that the software was designed against, and for each the tests that inject it.

P of preparation, T of training, E of evaluation, S of sweeps. A new fault of one of these kinds gets its test here.
"""

from __future__ import annotations

FAULTS, MACHINES, SWEEPS = (
    f"tests/faults/test_{name}.py" for name in ("train_faults", "train_machines", "sweep_faults")
)
RAY_DIED = "tests/faults/test_ray_died.py"
IMAGES, PASSES, VERIFY = "tests/prep/images", "tests/prep/passes", "tests/prep/verify/test_verify.py"
TRAIN, EVALUATE, SWEEP = "tests/train", "tests/evaluate", "tests/train/sweep/test_sweep.py"

LISTED: dict[str, dict[str, tuple[str, ...]]] = {  # id -> file -> tests
    "P01": {
        "tests/prep/test_bad_input.py": ("test_p01_p02_bad_files_become_rows_and_the_run_goes_on",),
        f"{IMAGES}/test_mutated.py": ("test_what_mutants_found", "test_some_mutants_end_well"),
        f"{IMAGES}/test_jpeg_damage.py": ("test_zeros_inside_are_refused_and_pillow_alone_takes_them",),
    },
    "P02": {
        f"{IMAGES}/test_sources.py": ("test_bombs_cost_no_memory", "test_bad_files_are_refused_from_their_header"),
        f"{IMAGES}/test_metadata.py": ("test_metadata_cost_no_memory",),
    },
    "P03": {
        f"{IMAGES}/test_sources.py": (
            "test_trap_05_the_exif_orientation_is_applied", "test_trap_05_one_bit_and_cmyk",
            "test_the_srgb_profile_changes_nothing_and_a_broken_one_is_ignored",
        )
    },
    "P04": {
        "tests/prep/test_bad_input.py": ("test_p04_images_without_a_usable_caption_are_left_out_when_allowed",),
        "tests/prep/captions/test_sidecar.py": ("test_trap_03_a_bad_caption_is_an_error_with_a_reason",),
    },
    "P05": {
        f"{IMAGES}/test_duplicates.py": (
            "test_p05_duplicates_stay_on_one_side_and_nothing_leaks",
            "test_p05_a_new_image_between_both_sides_is_refused",
        ),
        VERIFY: ("test_p05_a_near_duplicate_on_the_other_side_is_a_leak",),
    },
    "P06": {
        f"{IMAGES}/test_sources.py": (
            "test_links_and_hidden_names_are_refused_with_a_row",
            "test_a_name_that_is_not_utf8_is_refused_under_a_printable_name",
        ),
        f"{IMAGES}/test_out_of_reach.py": (
            "test_a_folder_that_cannot_be_listed_is_a_row_and_nothing_below_it_is_gone",
            "test_prune_refuses_and_names_the_folder",
        ),
    },
    "P07": {
        VERIFY: (
            "test_p07_a_hostile_tar_is_named_and_nothing_is_written",
            "test_p07_any_change_of_a_tar_is_found_and_none_stops_the_check",
        )
    },
    "P08": {VERIFY: ("test_p08_pickles_are_never_loaded",)},
    "P09": {VERIFY: ("test_p09_truncated_tars_and_missing_halves_are_found",)},
    "P10": {
        f"{PASSES}/test_killed.py": ("test_p10_a_killed_worker_or_actor_costs_nothing_but_its_time",),
        RAY_DIED: (
            "test_prep_run_says_that_its_ray_died_and_the_same_command_continues",
            "test_prep_run_in_a_cluster_says_that_the_raylet_beside_it_died",
        ),
    },
    "P11": {
        f"{PASSES}/test_killed.py": (
            "test_p11_a_killed_run_continues_and_ends_with_the_same_bytes",
            "test_p11_a_kill_between_the_steps_of_a_commit_leaves_no_half_unit",
            "test_p11_a_kill_while_publishing_is_repaired",
        )
    },
    "P12": {f"{PASSES}/test_supervisor.py": ("test_p12_a_poison_sample_is_rejected_and_no_innocent_one",)},
    "P13": {
        "tests/prep/encoders/test_halving.py": (
            "test_dino_gives_the_same_features_in_halves", "test_t5_gives_the_same_features_in_halves",
            "test_dwpose_gives_the_same_joints_in_halves", "test_a_worker_reports_what_it_had_to_do",
        )
    },
    "P14": {
        f"{PASSES}/test_preflight.py": (
            "test_a_full_disk_and_an_exhausted_quota_are_refused", "test_64_mb_of_shared_memory_are_refused",
            "test_a_read_only_output_is_refused_at_the_driver",
            "test_a_run_that_fills_the_disk_ends_with_4_and_the_same_command_continues",
        )
    },
    "P15": {
        f"{PASSES}/test_plan.py": (
            "test_p15_another_version_of_a_layers_code_redoes_it_and_what_depends_on_it",
            "test_p15_other_buckets_make_other_shards_and_nothing_is_mixed",
        )
    },
    "P16": {
        f"{PASSES}/test_missing_sources.py": (
            "test_p16_an_image_that_changes_during_the_run_is_refused",
            "test_p16_a_caption_that_changes_during_the_run_is_refused",
        )
    },
    "P17": {
        f"{PASSES}/test_captions.py": (
            "test_p17_a_host_that_hangs_is_given_up_after_the_timeout", "test_p17_redirects_are_refused",
        )
    },
    "P18": {"tests/prep/test_bad_input.py": ("test_p18_a_single_image_makes_a_dataset_and_a_warning",)},
    "T01": {FAULTS: ("test_T01_a_wrong_config_is_refused_before_anything_is_written",)},
    "T02": {FAULTS: ("test_T02_killed_at_any_stage_of_a_checkpoint",)},
    "T03": {FAULTS: ("test_T03_a_damaged_checkpoint_is_named_and_the_one_before_it_used",)},
    "T04": {FAULTS: ("test_T04_a_pickle_is_never_opened",)},
    "T05": {
        FAULTS: ("test_T05_killed_twice_and_resumed_is_byte_equal",),
        f"{TRAIN}/loop/test_everything.py": ("test_T05_killed_twice_and_resumed_is_byte_equal",),
    },
    "T06": {FAULTS: ("test_T06_a_changed_config_is_refused_with_the_difference",)},
    "T07": {FAULTS: ("test_T07_another_dataset_is_refused",)},
    "T08": {FAULTS: ("test_T08_a_sample_that_is_not_a_number_stops_the_run",)},
    "T09": {MACHINES: ("test_T09_too_little_memory_to_validate_costs_no_step",)},
    "T10": {
        FAULTS: ("test_T10_a_disk_that_takes_no_more_is_a_resource_error_and_costs_no_checkpoint",),
        MACHINES: ("test_T10_a_disk_that_is_full_at_a_picture_stops_the_run_after_its_last_step",),
        f"{TRAIN}/plan/test_plan.py": ("test_fault_t10_a_full_disk_is_foreseen_and_the_run_not_started",),
    },
    "T11": {
        FAULTS: ("test_T11_sigterm_saves_and_says_how_to_continue", "test_T11_the_second_signal_ends_at_once"),
        MACHINES: ("test_T11_a_signal_while_a_checkpoint_is_written_waits_for_it",),
    },
    "T12": {
        FAULTS: ("test_T12_a_bad_shard_stops_the_run_and_is_named",),
        MACHINES: ("test_T12_a_stalled_storage_is_said_and_a_signal_does_not_wait_for_it",),
    },
    "T13": {FAULTS: ("test_T13_small_buckets_and_sets_are_announced",)},
    "T14": {
        f"{TRAIN}/test_hardware.py": ("test_compiling_needs_a_compiler",),
        f"{TRAIN}/test_main.py": ("test_no_gpu_is_said",),
    },
    "T15": {FAULTS: ("test_T15_the_second_trainer_on_a_folder_is_refused", "test_T15_a_stale_lock_locks_nothing")},
    "T16": {MACHINES: ("test_T16_what_looks_on_may_fail_and_training_is_the_same",)},
    "T17": {FAULTS: ("test_T17_a_resume_hides_later_events_and_tolerates_a_torn_line",)},
    "E01": {
        f"{EVALUATE}/test_subject.py": ("test_a_leak_stops_the_evaluation_and_lists_the_pairs",),
        f"{EVALUATE}/test_run.py": ("test_a_leak_ends_with_three",),
    },
    "E02": {f"{EVALUATE}/test_run.py": ("test_degenerate_outputs_are_null_with_a_reason",)},
    "E03": {f"{EVALUATE}/test_run.py": ("test_batch_size_and_order_move_no_number",)},
    "E04": {f"{EVALUATE}/test_run.py": ("test_missing_metric_weights_are_skipped_and_strict_minds",)},
    "E05": {
        f"{EVALUATE}/statistics/test_verdicts.py": ("test_one_seed_is_no_verdict_and_two_are_too_few",),
        f"{EVALUATE}/statistics/test_intervals.py": ("test_too_few_images_are_inconclusive",),
        f"{EVALUATE}/report/test_compare.py": ("test_reports_on_other_data_or_of_another_version_share_nothing",),
    },
    "E06": {f"{EVALUATE}/test_run.py": ("test_a_killed_evaluation_goes_on_to_the_same_bytes",)},
    "E07": {
        "tests/prep/report/test_report.py": ("test_every_string_is_escaped_and_nothing_is_loaded",),
        f"{EVALUATE}/report/test_report.py": ("test_a_browser_opens_it_from_disk_and_on_a_phone",),
    },
    "E08": {
        f"{EVALUATE}/test_run.py": ("test_known_models_come_out_in_the_known_order",),
        f"{EVALUATE}/suite/test_oracles.py": ("test_only_the_copy_cat_sets_off_the_alarm_of_memorisation",),
    },
    "E09": {
        f"{EVALUATE}/suite/test_pose.py": (
            "test_the_asked_pose_scores_one_and_its_mirror_image_less",
            "test_samples_without_a_person_are_counted_and_not_scored",
        )
    },
    "S01": {SWEEPS: ("test_S01_a_trial_that_dies_harms_no_other",)},
    "S02": {
        SWEEPS: ("test_S02_a_sweep_whose_driver_is_killed_goes_on",),
        RAY_DIED: ("test_a_sweep_says_that_its_ray_died_and_goes_on",),
    },
    "S03": {SWEEP: ("test_S03_a_gpu_that_is_still_used_is_waited_for_and_its_user_named",)},
    "S04": {SWEEP: ("test_S04_asha_stops_the_worse_and_marks_it",)},
    "S05": {SWEEP: ("test_S05_code_that_changed_is_refused_or_a_cohort_of_its_own",)},
    "S06": {
        SWEEPS: ("test_S01_a_trial_that_dies_harms_no_other",),  # in a folder with a space in its name
        SWEEP: ("test_a_sweep_that_was_moved_or_copied_trains_where_it_lies",),
        MACHINES: ("test_T02_retention_keeps_the_newest_and_every_nth",),
    },
    "S07": {f"{PASSES}/test_ray_passes.py": ("test_s07_nobody_else_reads_the_token",)},
    "S08": {SWEEP: ("test_S08_values_of_secret_variables_are_hidden",)},
    "S09": {SWEEP: ("test_S09_a_wrong_primary_metric_fails_before_launch",)},
    "S10": {SWEEP: ("test_S10_how_many_fit_and_whether_they_share",)},
}  # fmt: skip

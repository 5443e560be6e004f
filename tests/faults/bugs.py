"""The tests' own test: mistakes that somebody could make, each with the case that must catch it.

A bug is one piece of text in one file put in place of another. The table in docs/reliability.md is made from this list
(`python -m tests.faults.bugs`). A bug whose text is not found any more, or whose case does not fail, fails the suite.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bug:
    """One mistake.

    Attributes:
        what: in words.
        file: where, from the repository's root.
        right, wrong: the text there, which occurs once, and what takes its place.
        caught_by: the case that fails then, as pytest names it.
    """

    what: str
    file: str
    right: str
    wrong: str
    caught_by: str


BUGS = (
    Bug(
        "synchronous=OFF: commits are acknowledged before they are on the disk",
        "service/store/database.py",
        'connection.execute("PRAGMA synchronous=FULL")',
        'connection.execute("PRAGMA synchronous=OFF"); level = 2; return',
        "tests/faults/test_power.py::test_what_was_acknowledged_outlives_a_loss_of_power",
    ),
    Bug(
        "the kernel is changed before the intent is in the log",
        "service/reconcile/finishing.py",
        '        failpoints.reach("engine.intent.before")\n',
        "        await self._applying.converge(wanted)\n",
        "tests/reconcile/test_engine.py::test_a_log_that_cannot_be_written_means_no_kernel_change",
    ),
    Bug(
        "no EXCL: a stranger's device is taken for a new one",
        "service/kernel/batch.py",
        "multi_queue=step.multi_queue, exclusive=True)",
        "multi_queue=step.multi_queue, exclusive=False)",
        "tests/kernel/test_contract.py::test_create_refuses_a_name_that_somebody_has_and_leaves_them_alone",
    ),
    Bug(
        "no look at the alias before a change",
        "service/kernel/batch.py",
        "        if link.token == member.token:\n            return link.ifindex\n",
        "        if link.is_tun:\n            return link.ifindex\n",
        "tests/kernel/test_contract.py::test_no_step_touches_a_link_without_exactly_our_token",
    ),
    Bug(
        "no look at the alias before a delete",
        "service/kernel/batch.py",
        "            if _read(body).token != step.token:\n",
        "            if False:\n",
        "tests/kernel/test_contract.py::test_delete_leaves_a_stranger_with_our_old_ifindex_alone",
    ),
    Bug(
        "a link group is deleted without looking who is in it",
        "service/kernel/batch.py",
        "                if not self._is_ours_alone(group, leaving, left):\n",
        "                if False:\n",
        "tests/kernel/test_batch.py::test_somebody_put_into_our_group_is_not_deleted_with_it",
    ),
    Bug(
        "persistent before it is marked: a crash leaves a link that nobody owns",
        "service/kernel/batch.py",
        "self._mark(opened)\n                for member, fd in opened:\n                    _keep(member, fd)\n",
        "for member, fd in opened:\n                    _keep(member, fd)\n                self._mark(opened)\n",
        "tests/kernel/test_batch.py::test_every_device_of_a_batch_is_marked_before_it_can_outlive_us",
    ),
    Bug(
        "an alias is put back on a link that nobody watched",
        "service/kernel/batch.py",
        "or not self._vouched(link.ifindex, member.token):",
        "or False:",
        "tests/kernel/test_contract.py::test_no_alias_is_put_on_a_link_that_nobody_vouches_for",
    ),
    Bug(
        "the outcome is not written",
        "service/reconcile/finishing.py",
        "            await self._journal.append(drafts, _together(jobs))\n",
        "            await self._journal.append([], _together(jobs))\n",
        "tests/e2e/test_restart.py::test_after_a_kill_the_interface_is_adopted_as_it_is",
    ),
    Bug(
        "a failed command is not undone",
        "service/reconcile/finishing.py",
        "undone = await self._undo(wanted) if error is not None else True",
        "undone = True",
        "tests/reconcile/test_engine.py::test_a_create_that_fails_at_any_step_leaves_nothing",
    ),
    Bug(
        "intents that a crash left open are not finished",
        "service/reconcile/reconciling.py",
        "                    await self._recover(pending, summary)\n",
        "                    pass\n",
        "tests/e2e/test_guarantees.py::test_a_key_whose_command_a_crash_cut_off_gets_the_answer_of_its_recovery",
    ),
    Bug(
        "an Idempotency-Key is not stored with its intent",
        "service/reconcile/finishing.py",
        '        failpoints.reach("engine.intent.before")\n        await self._journal.append(drafts, also)\n',
        "        await self._journal.append(drafts)\n",
        "tests/reconcile/test_engine.py::test_a_key_is_taken_from_the_moment_its_intent_is_in_the_log",
    ),
    Bug(
        "orphans are not removed",
        "service/reconcile/orphans.py",
        "orphans = [link for each, link in suspects.items() if each in known and each not in declared]",
        "orphans: list[ObservedLink] = []",
        "tests/e2e/test_restart.py::test_an_orphan_with_our_token_is_removed_and_others_are_not",
    ),
    Bug(
        "links that the log never heard of are removed as orphans",
        "service/reconcile/orphans.py",
        "        known = await asyncio.to_thread(self._knows, list(suspects))",
        "        known = set(suspects)",
        "tests/faults/test_strangers.py::test_a_token_of_ours_that_the_log_never_heard_of_is_left_alone_and_told_of",
    ),
    Bug(
        "hashes are not chained",
        "service/store/writer.py",
        "        digest = codec.chain_hash(\n            self._head,\n",
        "        digest = codec.chain_hash(\n            codec.GENESIS,\n",
        "tests/e2e/test_restart.py::test_after_a_kill_the_interface_is_adopted_as_it_is",
    ),
    Bug(
        "a log that does not verify is acted upon",
        "service/app.py",
        "            if found.found.problems:\n",
        "            if False:\n",
        "tests/e2e/test_restart.py::test_a_changed_log_is_served_read_only_and_deletes_nothing",
    ),
    Bug(
        "after a failed fsync it goes on as if nothing had been",
        "service/store/writer.py",
        "            )\n            self._break(batch, fault)\n        elif fault is not None and fault.code",
        "            )\n            _tell(batch, fault)\n        elif fault is not None and fault.code",
        "tests/store/test_reserve.py::test_a_commit_that_may_be_in_the_wal_though_it_failed_is_unknown_and_the_end",
    ),
    Bug(
        "the reserve is never given back: nothing can be deleted on a full disk",
        "service/store/writer.py",
        "            if entitled and self._reserve.release(down_to=_down_to(claim)):\n",
        "            if False:\n",
        "tests/faults/test_disk.py::test_a_full_disk_refuses_writes_with_no_effect_and_heals",
    ),
    Bug(
        "two services on one database",
        "service/store/database.py",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "tests/e2e/test_restart.py::test_two_services_on_one_database_the_second_names_the_first",
    ),
    Bug(
        "totals begin anew with a recreated link",
        "service/domain/counters.py",
        "        self.closed.update(self.raw)\n",
        "",
        "tests/faults/test_hostile.py::test_a_reboot_brings_everything_back_and_counts_nothing_twice",
    ),
    Bug(
        "one ETag for two states",
        "service/domain/state.py",
        "generation=interface.generation + (interface.pending.spec != interface.spec),",
        "generation=interface.generation or 1,",
        "tests/e2e/test_guarantees.py::test_if_match_lets_only_the_first_of_two_writers_through",
    ),
    Bug(
        "a deadline that passed is not kept",
        "service/reconcile/deadlines.py",
        "            if self._left_s(awaiting) <= 0 and self._take_back_in_s(awaiting) <= 0:\n",
        "            if False:\n",
        "tests/e2e/test_guarantees.py::test_a_deadline_that_passed_while_the_service_was_down_is_kept_at_its_start",
    ),
    Bug(
        "the monitor's news wakes nobody",
        "service/reconcile/engine.py",
        "            loop.call_soon_threadsafe(self.wake.set)\n",
        "            pass\n",
        "tests/e2e/test_drift.py::test_a_change_by_others_is_heard_of_told_once_and_mended",
    ),
    Bug(
        "lost messages of the kernel are passed over",
        "service/reconcile/wakeups.py",
        "            if news.lost:\n",
        "            if False:\n",
        "tests/faults/test_hostile.py::test_lost_messages_of_the_kernel_lead_to_a_look_at_everything",
    ),
    Bug(
        "whoever fights back is fought for ever",
        "service/reconcile/troubles.py",
        "        if len(recent) < CONTEST_REPAIRS:\n",
        "        if True:\n",
        "tests/faults/test_hostile.py::test_somebody_who_fights_back_is_not_fought_for_ever",
    ),
    Bug(
        "a capture has its first packet before the log has the capture",
        "service/reconcile/captures.py",
        "                await self._register.begin(capture, asker)\n"
        "            except BaseException:\n                os.close(fd)\n                self._files.unlink(capture)\n"
        "                raise\n            await self._attach(capture, fd)\n",
        "                await self._attach(capture, fd)\n"
        "            except BaseException:\n                os.close(fd)\n                self._files.unlink(capture)\n"
        "                raise\n            await self._register.begin(capture, asker)\n",
        "tests/reconcile/test_captures.py::test_a_capture_is_in_the_log_before_the_data_plane_hears_of_it",
    ),
    Bug(
        "stages begin anew with every change of their chain",
        "service/dataplane/work.py",
        "        same = next((each for each in left if each.spec == stage), None)\n",
        "        same = None\n",
        "tests/dataplane/test_chains.py::test_a_changed_chain_keeps_the_stages_it_has_in_common",
    ),
    Bug(
        "a packet is lost when a chain is changed",
        "service/dataplane/worker.py",
        "        return self._set_up(device, _read_setup(fds[0]), fds)\n",
        "        with contextlib.suppress(OSError):\n            os.read(device.fd, 65536)\n"
        "        return self._set_up(device, _read_setup(fds[0]), fds)\n",
        "tests/dataplane/test_chains.py::test_a_chain_that_is_changed_under_traffic_loses_no_packet",
    ),
    Bug(
        "a worker may call whatever it likes",
        "service/dataplane/confinement.py",
        "        syscalls.refuse_others(libc)\n",
        "        pass\n",
        "tests/dataplane/test_chains.py::test_a_processor_can_open_nothing_and_start_nothing",
    ),
    Bug(
        "a stage that crashed is not left out, though it is to be",
        "service/dataplane/crashes.py",
        "            record.bypassed.add(place)\n",
        "            pass\n",
        "tests/dataplane/test_crashes.py::test_a_stage_is_left_out_after_its_crash_until_the_chain_changes",
    ),
    Bug(
        "a start remembers an event that may never have been synced",
        "service/store/writer.py",
        "        allocate_index(self._path)\n",
        "        allocate_index(self._path)\n        self._headfile.write(self._position, self._head)\n",
        "tests/store/test_headfile.py::test_a_start_names_nothing_that_it_only_found",
    ),
    Bug(
        "a worker's ring may do whatever the kernel can",
        "service/dataplane/ring.py",
        "            self._restrict()\n",
        "            self._call(_REGISTER, self._fd, _REGISTER_ENABLE_RINGS)\n",
        "tests/dataplane/test_ring.py::test_it_can_read_and_write_and_nothing_else",
    ),
    Bug(
        "packets that another chain had in hand are written as if they were as they were read",
        "service/packet/rows.py",
        "        return len(packets) <= len(self.lengths) and same(packets, self._views)\n",
        "        return True\n",
        "tests/dataplane/test_ring.py::test_what_is_no_longer_in_the_rows_is_written_all_the_same",
    ),
    Bug(
        "a repair counts what a sample has counted already",
        "service/reconcile/counting.py",
        "        return [self.book.take_last(reading) for reading in readings]\n",
        "        return [self.book.take(reading) for reading in readings]\n",
        "tests/reconcile/test_engine.py::test_a_sample_between_a_look_and_its_repair_is_not_counted_twice",
    ),
)


def table() -> str:
    """The bugs and their cases, as Markdown."""
    rows = [
        f"| {bug.what} | `{bug.caught_by.partition('::')[2]}` in `{bug.caught_by.partition('::')[0]}` |" for bug in BUGS
    ]
    return "\n".join(["| deliberate bug | the case that catches it |", "| --- | --- |", *rows])


if __name__ == "__main__":
    print(table())

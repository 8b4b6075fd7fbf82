# Leftovers of other processes, what they do in the meantime, and a second fault together with the first one: no archive is
# lost, and all others can still be read.
#
# One QEMU is enough: qemu-img and qemu-nbd only use files.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use POSIX ();
use Test::More;

use File::Copy ();

use PBA::Test::Chain;
use PBA::Test::QemuNbd;
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Store::DirectoryLock qw(try_lock);

my $Archive = 'PVE::BackupAccess::Provider::Qcow2Chain::Archive';
my $Chain = 'PBA::Test::Chain';
my $Error = 'PVE::BackupAccess::Error';

my $base = $Chain->new->add_archives(3);
my @names = $base->names;
my $store = $base->store;

# The file of archive 1, 2 or 3.
sub of ($number, $file = 'drive-scsi0.qcow2') {
    return $base->path_of($names[$number - 1], $file);
}

sub make_empty ($file) {
    open(my $fh, '>', $file) or die "$file: $!\n";
    close($fh);
    return;
}

# Runs the code while a function that a class of the provider uses fails.
sub with_failing ($function, $code) {
    no strict 'refs';
    no warnings 'redefine';
    local *{"PVE::BackupAccess::Provider::$function"}
        = sub (@) { $Error->throw('SystemError', 'not today') };
    return eval { $code->(); 1 } ? '' : "$@";
}

# What the last archive builds on stays, whatever is left half-removed in between.
subtest 'a removal that cannot be completed' => sub {
    for my $half ([1], [0, 1]) {
        local $base->{expected} = { map { $_ => $base->{expected}{$_} } @names[0, 2] };
        $base->use_copy($store);
        for my $archive (map { $base->path_of($names[$_]) } $half->@*) {
            rename("$archive/manifest.json", "$archive/removed.json") or die "rename: $!\n";
        }
        for my $action (qw(remove prune)) {
            my @what = $action eq 'remove' ? $names[0] : (100, 1);
            my $error = with_failing('Qcow2Chain::Content::commit_image',
                sub () { $base->provider->$action(@what) });
            like(
                $base->log,
                qr/^warn: cannot complete the removal of archive .* - not today$/m,
                "$action: it says what is left"
            );
            like(
                $error,
                qr/cannot be removed - the removal of archive .* has to be completed first/,
                "$action: why the one below stays"
            ) if $half->@* == 1;
            ok(-e of(1), "$action: and it is there");
        }
        $base->provider->prune(100, 1);
        $base->forget($names[0]);
        $base->check('completed');
    }
};

# The content that the archives show is the same before, during and after a merge.
subtest 'a removal that is half done, beside a reader' => sub {
    local $base->{expected} = { map { $_ => $base->{expected}{$_} } @names[0, 2] };
    $base->use_copy($store);
    my $archive = $base->path_of($names[1]);
    rename("$archive/manifest.json", "$archive/removed.json") or die "rename: $!\n";
    PBA::Test::QemuNbd::img('commit', '-q', '-d', '-f', 'qcow2', of(3));
    my $reading = try_lock($base->guest_dir, 'read');
    is_deeply($base->provider->verify($names[2]), [], 'what builds on it is intact');
    is_deeply([values $base->next_modes->%*], [qw(use use)], 'and can be built on');
    is_deeply([map { $_->{mark} } $base->provider->retention(100, 2)->@*],
        [qw(keep keep)], 'and counts');
    undef($reading);
    is_deeply($base->provider->verify($names[2]), [],
        'and is intact when the removal is completed');
    is_deeply([map { $_->{damaged} // () } $base->provider->list(100)->@*], [], 'nothing is noted');
    $base->check('completed');
};

# A store with full backups.
sub new_chain ($count) {
    my $chain = $Chain->new;
    $chain->provider->make_full(1);
    return $chain->add_archives($count);
}

# A program that cannot run says nothing about the archives.
subtest 'a verification that cannot be done' => sub {
    my $chain = $Chain->new->add_archives(3);
    my @all = $chain->names;
    {
        local $PVE::BackupAccess::Provider::Store::Server::qemu_nbd = $chain->tmp . '/none';
        for my $name (@all) {
            ok(!eval { $chain->provider->verify($name); 1 }, 'it dies');
            like($@, qr/^drive-efidisk0: cannot serve .* cannot run /, 'it says why');
        }
    }
    is_deeply([map { $_->{damaged} // () } $chain->provider->list(100)->@*],
        [], 'no damage is noted');
    is_deeply([values $chain->next_modes->%*], [qw(use use)], 'a backup builds on the archives');
    $chain->provider->make_full(1);
    $chain->add_archives(1);
    is_deeply($chain->provider->prune(100, 3), [$all[0]], 'and prune removes what is not kept');
    $chain->forget($all[0]);
    $chain->check('pruned');
};

subtest 'an archive that cannot be looked at when others are pruned' => sub {
    my $chain = new_chain(3);
    my @all = $chain->names;
    my $script = $chain->tmp . '/qemu-img';
    my $real = $ENV{PBA_QEMU_IMG} // 'qemu-img';
    open(my $fh, '>', $script) or die "$script: $!\n";
    print {$fh}
        qq{#!/bin/sh\ncase "\$*" in info*$all[1]*) kill -9 \$\$ ;; esac\nexec "$real" "\$@"\n};
    close($fh) && chmod(0755, $script) or die "$script: $!\n";
    {
        local $PVE::BackupAccess::Provider::Qcow2Chain::Image::qemu_img = $script;
        is_deeply($chain->provider->prune(100, 2), [], 'stays');
    }
    like(
        $chain->log,
        qr/^warn: archive \Q$all[1]\E is kept, since it cannot be determined .* by signal 9$/m,
        'and the log says why'
    );
    is_deeply($chain->provider->prune(100, 2), [$all[0]], 'the next prune counts it');
    $chain->forget($all[0]);
    $chain->check('pruned');
};

# As on a file system that does not distinguish upper and lower case.
subtest 'two devices with the same file' => sub {
    $base->use_copy($store);
    my $archive = $Archive->begin($base->guest_dir, '20200101T000000Z');
    make_empty($archive->dir . '/Drive.qcow2');
    ok(!eval { $archive->add_device('Drive', { size => 65536 }); 1 }, 'are refused');
    like(
        $@,
        qr{^device Drive: another device already has the file /.* upper and lower case$}m,
        'the error says why'
    );
    $base->provider->_guest('vm/100')->give_up($archive);
};

# An old archive may have been moved to another disk, with a link in its place.
subtest 'an archive on another file system' => sub {
    $base->use_copy($store);
    my $other = $names[0] =~ s{.*/}{}r;
    {
        no warnings 'redefine';
        local *PVE::BackupAccess::Provider::Qcow2Chain::Merge::_file_system
            = sub ($file) { $file =~ m{/$other/} ? 2 : 1 };
        ok(!eval { $base->provider->remove($names[0]); 1 }, 'is not merged');
    }
    like($@, qr{/$other/\S+ is on another file system than /}, 'the error says why');
    $base->check('all are there');
};

subtest 'a manifest that would be refused' => sub {
    $base->use_copy($store);
    my $archive = $Archive->begin($base->guest_dir, '20200101T000000Z', guest => ['x']);
    ok(!eval { $archive->seal; 1 }, 'belongs to no archive');
    like(
        $@,
        qr/^the manifest of the new archive .* is not valid - its guest is not a text$/m,
        'the error says why'
    );
    $base->provider->_guest('vm/100')->give_up($archive);
};

subtest 'a merge whose digests cannot be written' => sub {
    local $base->{expected} = { map { $_ => $base->{expected}{$_} } @names[0, 2] };
    $base->use_copy($store);
    my ($is_removed, $problem);
    with_failing(
        'Qcow2Chain::Merge::merge_digests',
        sub () {
            $is_removed = eval { $base->provider->remove($names[1]); 1 };
            $problem = $base->problem($names[2]);
        }
    );
    is_deeply([$is_removed, $problem], [undef, ''], 'what builds on it is still restored');
    $base->check('completed');
};

# A guest that was rolled back: its bitmaps are relative to the first archive again. Once the removal of the second one is
# completed, the third one builds on the first. If a new one did so too, the first could not be removed any more.
subtest 'a base that an archive builds on whose removal is not complete' => sub {
    my $chain = $Chain->new->add_archives(3);
    my @three = $chain->names;
    my $name = $three[0] =~ s{.*/}{}r;
    my $first = $Archive->load($chain->guest_dir, $name);
    my $half = $chain->path_of($three[1]);
    rename("$half/manifest.json", "$half/removed.json") or die "rename: $!\n";
    my $reading = try_lock($chain->guest_dir, 'read');
    $chain->log;
    $chain->write_random;
    $chain->backup(base => $first->id) or die $chain->error;
    my $log = $chain->log;
    undef($reading);
    is_deeply($chain->modes, { map { $_ => 'new' } $chain->devices }, 'the next backup is full');
    like(
        $log,
        qr/^warn: $_: full backup - another archive already builds on archive $name$/m,
        "$_: it says why"
    ) for $chain->devices;
    is_deeply(scalar(eval { $chain->provider->prune(100, 2) }),
        [$three[0]], 'the base can be removed')
        or diag($@);
    $chain->forget(@three[0, 1]);
    $chain->check('and the others are right');
};

subtest 'an archive that is protected while a prune looks at others' => sub {
    my $chain = $Chain->new;
    for (1, 2) {
        $chain->provider->make_full(1);
        $chain->write_random;
        $chain->backup or die $chain->error;
    }
    my @both = $chain->names;
    my $look = PVE::BackupAccess::Provider::Qcow2Chain::Guest->can('is_built_on');
    no warnings 'redefine';
    local *PVE::BackupAccess::Provider::Qcow2Chain::Guest::is_built_on = sub (@which) {
        make_empty($chain->path_of($both[0], 'protected'));
        return $look->(@which);
    };
    ok(!eval { $chain->provider->prune(100, 1); 1 }, 'it fails');
    like($@, qr/cannot remove .* is protected - remove the file 'protected' in it first/,
        'and says why');
    is_deeply([$chain->names], \@both, 'nothing is gone');
};

subtest 'a leftover that cannot be removed' => sub {
    my $copy = $base->use_copy($store);
    mkdir("$copy/vm/100/.tmp-20200101T000000Z") or die "mkdir: $!\n";
    my $problems;
    my $error = with_failing('Store::DirectoryGuest::remove_unused',
        sub () { $problems = $base->provider->verify($names[2]) });
    is_deeply([$error, $problems], ['', []], 'archives are read all the same');
    like($base->log, qr/^warn: cannot remove what a killed process left - not today$/m,
        'it says so');
    $base->check('with the next try');
};

# A new name of a file does not protect its content.
subtest 'a copy of the store by hard links' => sub {
    $base->use_copy($store);
    my ($here, $linked) = ($base->store, $base->tmp . '/linked');
    system('cp', '-al', $here, $linked) == 0 or die "cp: $?\n";
    {
        local $base->{expected} = { $base->{expected}->%* };
        $base->provider->prune(100, 1);
        $base->forget(@names[0, 1]);
        $base->check('pruned');
    }
    $base->use_store($linked);
    $base->check('the copy');
};

subtest 'the current directory does not exist any more' => sub {
    require Cwd;
    my $before = Cwd::getcwd();
    local $base->{expected} = { $base->{expected}->%* };
    $base->use_copy($store);
    my $gone = $base->tmp . '/gone';
    mkdir($gone) && chdir($gone) && rmdir($gone) or die "$gone: $!\n";
    my $done = eval { $base->provider->remove($names[2]); 1 };
    my $error = $@;
    chdir($before) or die "$before: $!\n";
    ok($done, 'an archive is removed') or diag($error);
    $base->forget($names[2]);
    $base->check('the others');
};

subtest 'a removal that fails midway' => sub {
    $base->use_copy($store);
    local $base->{expected} = { $base->{expected}->%* };
    my $error = with_failing('Qcow2Chain::Content::commit_image',
        sub () { $base->provider->remove($names[0]) });
    like(
        $error,
        qr/\Athe removal of archive \S+ could not be completed - not today - .* the next backup, prune or removal of this guest completes it$/,
        'the error says what to do'
    );
    $base->forget($names[0]);
    $base->check('it is completed');
};

subtest 'programs that are killed' => sub {
    $base->use_copy($store);
    my $image = of(3);
    my $server = PVE::BackupAccess::Provider::Qcow2Chain::Server->start($image, writable => 1);
    kill(KILL => $server->pid);
    ok(!eval { $server->stop; 1 }, 'qemu-nbd');
    like(
        $@,
        qr/\Aqemu-nbd, which served \Q$image\E, was ended by signal 9\b/,
        'the error names the image'
    );
    local $PVE::BackupAccess::Provider::Qcow2Chain::Image::qemu_img = $base->tmp . '/killed';
    open(my $script, '>', $base->tmp . '/killed') or die "killed: $!\n";
    print {$script} "#!/bin/sh\nkill -9 \$\$\n";
    close($script) && chmod(0755, $base->tmp . '/killed') or die "killed: $!\n";
    ok(!eval { $base->provider->verify($names[2]); 1 }, 'qemu-img');
    my $dir = $base->path_of($names[2]);
    like($@, qr{killed check of \Q$dir\E/\S+[.]qcow2 was ended by signal 9$}, 'this, too');
};

# In a process that has no descriptor left: the error of a new private directory.
my $without_descriptors = <<'PERL';
use v5.36;
use PVE::BackupAccess::Provider::Store::PrivateDir;
my (@held, $error);
alarm(20);
while (open(my $fh, '<', '/dev/null')) { push(@held, $fh) }
eval { PVE::BackupAccess::Provider::Store::PrivateDir->new($ARGV[0]); 1 } or $error = $@;
@held = ();
print $error // 'none';
PERL

subtest 'no descriptor is left' => sub {
    my $tmp = $base->tmp . '/few';
    mkdir($tmp) or die "$tmp: $!\n";
    my @perl = ($^X, (map { "-I$_" } @INC), '-e', $without_descriptors, $tmp);
    open(my $from, '-|', 'sh', '-c', 'ulimit -n 50; exec "$@"', 'sh', @perl) or die "sh: $!\n";
    like(
        readline($from),
        qr{^cannot lock the temporary directory \Q$tmp\E/\S+ - Too many open files$},
        'a private directory: an error'
    );
    is_deeply([glob("$tmp/*")], [], 'and nothing is left');
};

subtest 'what a backup of the same time has left' => sub {
    $base->use_store($store);
    my $reading = try_lock($base->guest_dir, 'read');
    my $name = POSIX::strftime('%Y%m%dT%H%M%SZ', gmtime($base->{time} + 60));
    my $left = $base->guest_dir . "/.tmp-$name";
    mkdir($left) or die "mkdir: $!\n";
    my $digests = 'drive-scsi0.digests';
    File::Copy::copy(of(3, $digests), "$left/$digests") or die "copy: $!\n";
    $base->write_random(1);
    $base->backup or die $base->error;
    undef($reading);
    $base->check('the archive has its own digests');
};

# Such as a rename that the server did, but did not acknowledge.
subtest 'a backup fails although its archive has its name' => sub {
    $base->use_store($store);
    my @before = $base->names;
    my $move = PVE::BackupAccess::Provider::Store::DirectoryArchive->can('move');
    my $failing = sub ($from, $to) {
        $move->($from, $to);
        $Error->throw('SystemError', 'no answer') if $from =~ m{/[.]tmp-[^/]+\z};
    };
    $base->write_random;
    {
        no warnings 'redefine';
        local *PVE::BackupAccess::Provider::Store::DirectoryArchive::move = $failing;
        is($base->backup, undef, 'it fails');
    }
    is($base->error, "no answer\n", 'with its own error');
    my ($new) = reverse($base->names);
    is_deeply([$base->names], [@before, $new], 'the archive is there');
    $base->expect($new);
    $base->write_random;
    $base->backup or die $base->error;
    $base->check('and after the next one');
};

done_testing;

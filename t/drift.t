# Detects changes of others: Proxmox VE's backup provider API and storage plugins compared with their stand-ins,
# and the QAPI of a QEMU compared with what is sent to it and read from its replies. This test names the changes
# of a release that break the module.

use v5.36;

use lib 't/lib';

use File::Temp ();
use JSON::PP ();
use Test::More;

use PBA::Test::ScriptedQEMU;
use PBA::Test::VM;
use PVE::BackupAccess::Retention qw(marks periods);

sub content ($file) {
    open(my $fh, '<', $file) or die "$file: $!\n";
    local $/;
    return scalar(<$fh>);
}

# ---- the backup provider API ----

my $base = 'PVE/BackupProvider/Plugin/Base.pm';
my $stand_in = "lib/PVE/BackupAccess/StandIn/$base";
do "./$stand_in" or die "$stand_in: $@\n";
my %arguments = do { no warnings 'once'; %PVE::BackupProvider::Plugin::Base::ARGUMENTS };

# { method => 'its arguments' } in Proxmox' style; '?' for methods in another style.
sub declared ($source) {
    my %declared = $source =~ m/^sub (\w+) \{\n\s+my \(\$\w+,? ?(.*?)\) = \@_;/mg;
    s/[\$,]//g for values(%declared);
    return { (map { $_ => '?' } $source =~ m/^sub (\w+)/mg), %declared };
}

# The sources of pve-storage, which are also among those for t/real-qemu-server.t.
my $tree = $ENV{PBA_PVE_STORAGE};
$tree //= "$ENV{PBA_QEMU_SERVER}/pve-storage"
    if $ENV{PBA_QEMU_SERVER} && -d "$ENV{PBA_QEMU_SERVER}/pve-storage";

sub real_file ($name) {
    my @dirs = defined($tree) ? "$tree/src" : grep { !m/StandIn/ } @INC;
    my ($file) = grep { -e } map { "$_/$name" } @dirs;
    die "there is no $name in $tree\n" if defined($tree) && !$file;
    return $file;
}

SKIP: {
    my $file = real_file($base)
        // skip("needs Proxmox VE's backup provider API (PBA_PVE_STORAGE, or installed)", 1);
    is_deeply(declared(content($file)), \%arguments, "methods and arguments are those of $file");
}

# The minimum and maximum number of arguments of a method.
sub taken ($signature) {
    my (undef, @rest) = split(m/,\s*/, $signature);
    my $most = (grep { m/^\@/ } @rest) ? 100 : @rest;
    return (scalar(grep { m/^\$/ && !m/=/ } @rest), $most);
}

subtest 'our provider accepts the arguments' => sub {
    my $source
        = join('', map { content("lib/PVE/BackupAccess/Provider/$_.pm") } qw(Store Qcow2Chain));
    my %signature = $source =~ m/^sub (\w+) \((.*?)\) \{/mg;
    for my $method (sort keys(%arguments)) {
        my $given = () = $arguments{$method} =~ m/\w+/g;
        next if !exists($signature{$method});
        my ($least, $most) = taken($signature{$method});
        ok($least <= $given && $given <= $most, "$method: $given arguments");
    }
    cmp_ok(scalar(grep { exists($signature{$_}) } keys(%arguments)),
        '>', 15, 'most methods of the API were checked');
};

# ---- storage plugins ----

# { method => signature } in our style.
sub signatures ($file) { return { content($file) =~ m/^sub (\w+) \((.*?)\)\s*\{/mgs } }

# The methods that do not accept the arguments of the real ones.
sub unfit ($ours, $real) {
    return grep {
        my $given = () = $real->{$_} =~ m/\w+/g;
        my ($least, $most) = taken($ours->{$_});
        $given < $least || $given > $most;
    } sort grep { ($real->{$_} // '?') ne '?' } keys($ours->%*);
}

# Checked even if the real sources are missing, so that a moved file is noticed at once.
my $storage_version = qr/^(?:use constant|sub) (API\w+)\b.*?(\d+)/m;
my $plugin = signatures('examples/pve-storage-plugin/PVE/Storage/Custom/Qcow2ChainPlugin.pm');
my %storage_stand_ins = map { $_ => "lib/PVE/BackupAccess/StandIn/PVE/$_" }
    qw(Storage.pm Storage/Plugin.pm Storage/DirPlugin.pm);
my %known_versions = content($storage_stand_ins{'Storage.pm'}) =~ m/$storage_version/g;
is(join(' ', sort keys(%known_versions)), 'APIAGE APIVER', 'versions of the API that is tested');

# Methods of the stand-in that the real class does not have.
sub own_methods ($stand_in, $real) {
    my %other = map { $_ => 1 } qw(lookup register), keys(%known_versions);  # of PVE::SectionConfig
    return grep { !$real->{$_} && !$other{$_} } sort keys($stand_in->%*);
}

sub check_stand_in ($name) {
    my ($stand_in, $file) = ($storage_stand_ins{$name}, real_file("PVE/$name"));
    my ($ours, $real) = (signatures($stand_in), declared(content($file)));
    cmp_ok(scalar(keys($ours->%*)), '>', 0, "$stand_in has methods");
    is(join(' ', unfit($ours, $real)), '', "the stand-in accepts what $file passes");
    is(join(' ', own_methods($ours, $real)), '', 'the stand-in has no other methods');
    return;
}

# ---- retention ----

# Proxmox VE's own function that marks archives, without the rest of its module.
sub real_marks () {
    my ($helper, $function)
        = content(real_file('PVE/Storage.pm'))
        =~ m/^(my \$prune_mark = sub \{.*?^\};).*?^(sub prune_mark_backup_group \{.*?^\})/ms
        or die "Proxmox VE's rules of retention are somewhere else now\n";
    my $module = File::Temp->new(SUFFIX => '.pm', TMPDIR => 1);
    print {$module} join("\n",
        'package RealRetention; use v5.36; use POSIX qw(strftime);',
        $helper, $function, '1;');
    close($module);
    do "$module" or die "Proxmox VE's rules of retention: $@\n";
    return RealRetention->can('prune_mark_backup_group');
}

# The differences between the two for random archives, which are some hours to some weeks apart.
sub marked_otherwise ($mark) {
    my %keep = (map({ $_ => 0 } periods()), 'keep-last' => int(rand(2)));
    $keep{$_} = int(rand(5)) for grep { rand() < 0.5 } periods();
    $keep{'keep-last'} ||= 1 if !grep { $_ } values %keep;
    my ($time, $step) = (1_790_000_000, 3600 * 4**int(rand(6)));
    my @archives = map {
        {
            name => sprintf('%02d', $_),
            time => $time += 1 + int(rand($step)),
            protected => rand() < 0.1 ? 1 : 0,
            devices => { disk => 1 },
        }
    } 1 .. 30;
    my @real = map {
        { $_->%{'name'}, ctime => $_->{time}, $_->{protected} ? (mark => 'protected') : () }
    } @archives;
    $mark->(\@real, \%keep);
    my $ours = marks(\@archives, \%keep);
    return grep { $ours->{ $_->{name} } ne $_->{mark} } @real;
}

SKIP: {
    my $file = real_file('PVE/Storage/Plugin.pm')
        // skip("needs Proxmox VE's storage (PBA_PVE_STORAGE, or installed)", 6);
    my $mark = real_marks();
    my $seed = $ENV{PBA_SEED} // time;
    srand($seed);
    is(scalar(grep { marked_otherwise($mark) } 1 .. 1000),
        0, "archives are kept as by Proxmox VE (PBA_SEED=$seed)");
    my $real = declared(content($file));
    is(join(' ', unfit($plugin, $real)), '', "our storage plugin takes what $file gives");
    for my $name (sort keys(%storage_stand_ins)) {
        subtest "the stand-in for $name" => sub { check_stand_in($name) };
    }
    my %versions = content(real_file('PVE/Storage.pm')) =~ m/$storage_version/g;
    is_deeply({ map { $_ => $versions{$_} } keys(%known_versions) },
        \%known_versions, 'the version of the API is the one that is tested');
}

subtest 'drift of a plugin is found' => sub {
    my %ours = (path => '$class, $scfg, $volname, @', list => '$class, $id, $more = undef');
    is_deeply([unfit(\%ours, { path => 'scfg, volname, storeid', list => 'id' })],
        [], 'matching signatures');
    is_deeply([unfit(\%ours, { path => 'scfg', list => 'id' })], ['path'], 'too few arguments');
    is_deeply([unfit(\%ours, { list => 'id, type, vmid' })], ['list'], 'too many arguments');
};

# ---- QAPI ----

# A type of a schema by its name.
sub index_of ($schema) {
    return { map { $_->{name} => $_ } $schema->@* };
}

sub is_builtin ($type, $value) {
    my $json = $type->{'json-type'};
    return ref($value) && JSON::PP::is_bool($value) if $json eq 'boolean';
    return !ref($value) && $value =~ m/\A-?\d+\z/ if $json =~ m/\A(?:int|number)\z/;
    return !ref($value);
}

# Also the members of the variant that the value selects.
sub members_for ($types, $type, $value) {
    my $tag = defined($type->{tag}) ? $value->{ $type->{tag} } // '' : '';
    my ($variant) = grep { $_->{case} eq $tag } ($type->{variants} // [])->@*;
    return ($type->{members}->@*, $variant ? $types->{ $variant->{type} }{members}->@* : ());
}

sub misfits_object ($types, $type, $value, $where) {
    return "$where: not an object" if ref($value) ne 'HASH';
    my %members = map { $_->{name} => $_ } members_for($types, $type, $value);
    my @missing = grep { !exists($members{$_}{default}) && !exists($value->{$_}) } keys(%members);
    my @unknown = grep { !$members{$_} } keys($value->%*);
    return (
        (map { "$where: '$_' is asked for" } sort @missing),
        (map { "$where: '$_' is not known" } sort @unknown),
        map { misfits($types, $members{$_}{type}, $value->{$_}, "$where.$_") }
            sort grep { $members{$_} } keys($value->%*),
    );
}

# What QEMU would refuse in a value, according to its own schema.
sub misfits ($types, $name, $value, $where) {
    my $type = $types->{$name} // return "$where: there is no type '$name'";
    my $meta = $type->{'meta-type'};
    return misfits_object($types, $type, $value, $where) if $meta eq 'object';
    return map { misfits($types, $type->{'element-type'}, $_, "$where\[]") } $value->@*
        if $meta eq 'array' && ref($value) eq 'ARRAY';
    if ($meta eq 'alternate') {
        my @tries = map { [misfits($types, $_->{type}, $value, $where)] } $type->{members}->@*;
        return (grep { !$_->@* } @tries) ? () : map { $_->@* } @tries;
    }
    my $fits
        = $meta eq 'enum' ? scalar(grep { $_ eq $value } $type->{values}->@*)
        : $meta eq 'builtin' ? is_builtin($type, $value)
        : 0;
    return $fits ? () : "$where: not of the type '$meta'";
}

# The type of a member of a reply, by a path such as 'inserted.image.virtual-size'.
sub type_of ($types, $name, $path) {
    my $type = $types->{$name} // return;
    $type = $types->{ $type->{'element-type'} } while $type->{'meta-type'} eq 'array';
    return $type if $path eq '';
    my ($first, $rest) = split(m/\./, $path, 2);
    my @types = ($type, map { $types->{ $_->{type} } } ($type->{variants} // [])->@*);
    for my $member (map { ($_->{members} // [])->@* } @types) {
        return type_of($types, $member->{type}, $rest // '') if $member->{name} eq $first;
    }
    return;
}

sub reads_ok ($types, $command, @paths) {
    my @lost = grep { !type_of($types, $types->{$command}{'ret-type'}, $_) } @paths;
    is("@lost", '', "$command: the members that are read exist");
    return;
}

# What is sent with Proxmox' commands, with every mode.
sub proxmox_sends () {
    my $calls = qmp_calls({ pve_returns() });
    my $access = new_access($calls->{code});
    my @modes = qw(none new use);
    for my $mode (@modes) {
        $access->setup([map { { device => "drive-scsi$_", 'bitmap-mode' => $mode } } 0, 1]);
        $access->volumes('nbd');
        $access->teardown($mode eq 'use');
    }
    return map { [$calls->{names}[$_], $calls->{arguments}[$_]] } 0 .. $#{ $calls->{names} };
}

# Whether the commands accept what is sent; { command => how often it was sent }.
sub check_sent ($types, @sent) {
    my (%misfits, %checked);
    for my $sent (@sent) {
        my ($command, $arguments) = $sent->@*;
        $checked{$command}++;
        my $type = ($types->{$command} // {})->{'arg-type'};
        $misfits{$_}
            = 1
            for defined($type)
            ? misfits($types, $type, $arguments // {}, $command)
            : "$command: there is none";
    }
    is(join("\n", sort keys(%misfits)), '', 'all arguments match');
    return \%checked;
}

# The recording contains Proxmox' own commands, and no others of them.
sub check_proxmox ($types) {
    my $is_all = exists($types->{'query-version'});
    my $checked
        = check_sent($types, grep { $is_all || $_->[0] =~ m/\Abackup-access-/ } proxmox_sends());
    ok($checked->{$_}, "$_ was sent")
        for qw(backup-access-setup backup-access-teardown),
        $is_all ? qw(nbd-server-start block-export-add blockdev-add) : ();
    my @read = qw(node-name device size bitmap-node-name bitmap-name bitmap-action);
    reads_ok($types, 'backup-access-setup', @read);
    my $actions = type_of($types, $types->{'backup-access-setup'}{'ret-type'}, 'bitmap-action');
    for my $action ($actions->{values}->@*) {
        ok(eval { PVE::BackupAccess::bitmap_status($action); 1 }, "the action '$action' is known");
    }
    my %there = map { $_ => 1 } $actions->{values}->@*;
    my @ours = content('src/qemu/bitmap.c') =~ m/\[PBA_BITMAP_ACTION_\w+\] = "(.*)"/g;
    is(join(' ', grep { !$there{$_} } @ours), '', 'all known actions exist');
    is($types->{ $types->{'query-pbs-bitmap-info'}{'ret-type'} }{'meta-type'},
        'array', 'query-pbs-bitmap-info: a list, which is passed on');
    return;
}

subtest 'the recorded Proxmox QEMU' => sub {
    my ($reply)
        = content('t/recordings/support-and-schema.txt') =~ m/^C: .*"query-qmp-schema"\}\nS: (.*)/m;
    check_proxmox(index_of(JSON::PP->new->decode($reply)->{return}));
};

# Types in the form in which QEMU describes them.
my %sample_types = (
    args => {
        'meta-type' => 'object',
        members => [
            { name => 'device', type => 'str' },
            { name => 'mode', type => 'mode', default => undef }
        ],
    },
    str => { 'meta-type' => 'builtin', 'json-type' => 'string' },
    mode => { 'meta-type' => 'enum', values => ['none', 'file'] },
    union => {
        'meta-type' => 'object',
        tag => 'mode',
        members => [{ name => 'mode', type => 'mode' }],
        variants => [{ case => 'file', type => 'file' }],
    },
    file => { 'meta-type' => 'object', members => [{ name => 'path', type => 'either' }] },
    either => { 'meta-type' => 'alternate', members => [{ type => 'str' }, { type => 'args' }] },
);

subtest 'drift is found' => sub {
    my @cases = (
        [{ device => 'a' }, ''],
        [{ device => 'a', mode => 'none' }, ''],
        [{ mode => 'none' }, "x: 'device' is asked for"],
        [{ device => 'a', name => 'b' }, "x: 'name' is not known"],
        [{ device => 'a', mode => 'all' }, "x.mode: not of the type 'enum'"],
        [{ device => ['a'] }, "x.device: not of the type 'builtin'"],
    );
    is(join(' ', misfits(\%sample_types, 'args', $_->[0], 'x')), $_->[1], $_->[1] || 'fits')
        for @cases;
    my @variants = (
        [{ mode => 'file', path => 'a' }, ''],
        [{ mode => 'file', path => { device => 'a' } }, ''],
        [{ mode => 'none', path => 'a' }, "x: 'path' is not known"],
        [{ mode => 'file' }, "x: 'path' is asked for"],
    );
    is(join(' ', misfits(\%sample_types, 'union', $_->[0], 'x')), $_->[1], $_->[1] || 'fits')
        for @variants;
    is(type_of(\%sample_types, 'args', 'device')->{'json-type'},
        'string', 'the type of an existing member');
    is(type_of(\%sample_types, 'args', 'node'), undef, 'a member that does not exist');
    is_deeply(
        declared(
            "sub job_init {\n    my (\$self, \$start_time) = \@_;\n}\nsub job_run(\$self) {}\n"),
        { job_init => $arguments{job_init}, job_run => '?' },
        "the parameters of a method, and '?' for an unusual form"
    );
};

# The members that are read from each reply; nothing else is read.
my %reads = (
    'query-version' => [qw(qemu.major qemu.minor qemu.micro package)],
    'query-commands' => ['name'],
    'query-status' => ['status'],
    'query-migrate' => ['status'],
    'query-name' => ['name'],
    'query-uuid' => ['UUID'],
    'query-jobs' => [qw(id type status)],
    'qom-list' => [qw(name type)],
    'query-iothreads' => ['id'],
    'query-block-exports' => [qw(id type node-name shutting-down)],
    'query-block' => [
        qw(
            device qdev inserted.node-name inserted.ro inserted.image.virtual-size
            inserted.image.cluster-size
        )
    ],
    'query-named-block-nodes' => [
        qw(
            node-name drv ro image.virtual-size image.actual-size image.filename image.cluster-size
            image.format-specific.data.compat
        ),
        map { "dirty-bitmaps.$_" }
            qw(name count granularity recording busy persistent inconsistent),
    ],
    'x-debug-query-block-graph' => [
        qw(nodes.id nodes.type nodes.name),
        map { "edges.$_" } qw(parent child name perm shared-perm),
    ],
);

# Every command that the core names.
sub commands_sent () {
    my @names = map { content($_) =~ m/\bpba_qmp_\w+\([^;"]*?"([a-z][\w-]+)"/g }
        glob('src/*/*.c src/*/*/*.c');
    my %names = map { $_ => 1 } grep { !m/\A(?:backup-access-|query-pbs-)/ } @names;
    return sort keys(%names);
}

# Everything that accesses with every mode send, including exports, success and failure.
sub sent_to ($vm) {
    my @sent;
    my $code = sub ($command, $arguments) {
        push @sent, [$command, $arguments];
        return $vm->qmp($command, $arguments->%*);
    };
    my %options = ('target-id' => 'drift', 'run-dir' => $run_dir, 'fleecing-dir' => "$dir");
    my $access = PVE::BackupAccess->new(qmp => $code, %options);
    for my $step (['new', 1], ['use', 1], ['use', 0], ['none', 1]) {
        my ($mode, $success) = $step->@*;
        $access->setup([{ device => 'disk0', 'bitmap-mode' => $mode }]);
        $access->volumes('nbd');
        $access->teardown($success);
    }
    return @sent;
}

sub check_arguments ($vm, $types) {
    my $checked = check_sent($types, sent_to($vm));
    cmp_ok(scalar(keys($checked->%*)), '>', 15, 'enough commands are checked');
    ok($checked->{$_}, "$_ among them")
        for qw(transaction blockdev-reopen blockdev-backup block-export-add);
    return;
}

subtest 'this QEMU' => sub {
    my $vm = PBA::Test::VM->start(disks => [{ id => 'disk0' }], guest => 0, paused => 1);
    my $types = index_of($vm->qmp('query-qmp-schema'));
    my @sent = commands_sent();
    cmp_ok(scalar(@sent), '>', 20, 'commands that are sent');
    my @lost = grep { ($types->{$_}{'meta-type'} // '') ne 'command' } @sent;
    is("@lost", '', 'QEMU has all commands');
    push($reads{'query-named-block-nodes'}->@*, 'active') if $vm->version->[0] >= 10;
    reads_ok($types, $_, $reads{$_}->@*) for sort keys(%reads);

    if (PBA::Test::VM->is_proxmox) {
        subtest "Proxmox' commands" => sub { check_proxmox($types) };
    }
    else {
        subtest 'the arguments of all commands' => sub { check_arguments($vm, $types) };
    }
};

done_testing();

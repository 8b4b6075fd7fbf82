package PVE::BackupAccess::CLI::TryProvider::Rules;

# The rules of the backup provider API for each method. A rule compares the result of one call with the
# expectations ({ sizes, guest-config, firewall-config, fails, interrupted }), and says what is wrong.

use v5.36;

use Scalar::Util qw(tainted);

use PVE::BackupAccess::Task;

my sub shown ($value) {
    return 'undef' if !defined($value);
    return 'a reference to ' . lc(ref($value)) if ref($value);
    return "'" . substr($value =~ s/[[:cntrl:]]/ /gr, 0, 60) . "'";
}

# The processes that restore a guest run with -T, too.
my sub taint_problem ($what, $value) {
    return if !tainted($value);
    return
        "$what comes from a file or a program and was not checked (it is tainted), so Proxmox VE cannot run qemu-img with it";
}

my sub is_size ($value) { return defined($value) && !ref($value) && $value =~ m/\A[0-9]+\z/ }

my sub provider_name ($call, $expected) {
    my $name = $call->{result}[0];
    return if defined($name) && !ref($name) && $name ne '';
    return 'must return a name, not ' . shown($name);
}

my sub backup_init ($call, $expected) {
    my $result = $call->{result}[0];
    return q(must return a hash with 'archive-name', not ) . shown($result)
        if ref($result) ne 'HASH';
    my $name = $result->{'archive-name'};
    return if !ref($name) && PVE::BackupAccess::Task::_is_archive_name($name);
    return q('archive-name' must be of letters, digits and - . + = _ / : only, not ) . shown($name);
}

my sub backup_get_mechanism ($call, $expected) {
    my $mechanism = $call->{result}[0];
    return if ($mechanism // '') =~ m/\A(?:nbd|file-handle)\z/;
    return q(must return 'nbd' or 'file-handle' for a VM, not ) . shown($mechanism);
}

# The answer is a bitmap mode, or a hash with the mode and the ID of the archive that the backup would build on.
my sub answer_problem ($answer) {
    my ($mode, $base)
        = ref($answer) eq 'HASH' ? $answer->@{qw(bitmap-mode base)} : ($answer, undef);
    return q(must be 'new', 'use' or 'none', or a hash with that as 'bitmap-mode', not )
        . shown($mode)
        if ref($mode) || ($mode // 'none') !~ m/\A(?:new|use|none)\z/;
    return if !defined($base) || (!ref($base) && $base =~ m/\A[0-9a-f]{32}\z/);
    return q('base' must be the ID of a backup, not ) . shown($base);
}

my sub backup_vm_query_incremental ($call, $expected) {
    my $modes = $call->{result}[0];
    return if !defined($modes);
    return 'must return a hash of devices or nothing, not ' . shown($modes)
        if ref($modes) ne 'HASH';
    for my $device (sort keys $modes->%*) {
        return "returned the device '$device', which was not asked for"
            if !exists($expected->{sizes}{$device});
        my $problem = answer_problem($modes->{$device});
        return "device $device: $problem" if defined($problem);
    }
    return;
}

my sub backup_vm ($call, $expected) {
    return
        'returned although a signal was to end it: the exception of a signal handler must be passed on'
        if $call->{interrupted};
    return if !$expected->{fails};
    return 'returned although its source could not be read: later backups will lack the data';
}

my sub backup_cleanup ($call, $expected) {
    my ($vmid, $vmtype, $success) = $call->{arguments}->@*;
    return if !$success;
    my $result = $call->{result}[0];
    my $stats = ref($result) eq 'HASH' ? $result->{stats} : undef;
    my $size = ref($stats) eq 'HASH' ? $stats->{'archive-size'} : undef;
    return if is_size($size);
    return q(must return { stats => { 'archive-size' => bytes } } after a success);
}

my sub restore_get_mechanism ($call, $expected) {
    my ($mechanism, $type) = $call->{result}->@*;
    return if ($mechanism // '') eq 'qemu-img' && ($type // '') eq 'qemu';
    return q(must return ('qemu-img', 'qemu'), not )
        . join(', ', map { shown($_) } $mechanism, $type);
}

my sub config ($what) {
    return sub ($call, $expected) {
        my $text = $call->{result}[0];
        my $wanted = $expected->{$what};
        return if ($text // '') eq ($wanted // '');
        return
            defined($wanted)
            ? 'must return the configuration as it was backed up, not ' . shown($text)
            : 'must return undef, because the guest had none, not ' . shown($text);
    };
}

my sub restore_vm_init ($call, $expected) {
    my $volumes = $call->{result}[0];
    return 'must return a hash of devices, not ' . shown($volumes) if ref($volumes) ne 'HASH';
    for my $device (sort keys $expected->{sizes}->%*) {
        my $volume = $volumes->{$device} // return "lacks the device $device";
        my $size = ref($volume) eq 'HASH' ? $volume->{size} : undef;
        return "device $device: size must be $expected->{sizes}{$device}, not " . shown($size)
            if !is_size($size) || $size != $expected->{sizes}{$device};
        my $problem = taint_problem("device $device: size", $size);
        return $problem if defined($problem);
    }
    my ($other) = grep { !exists($expected->{sizes}{$_}) } sort keys $volumes->%*;
    return defined($other) ? "returned the device '$other', which was not backed up" : ();
}

my sub restore_vm_volume_init ($call, $expected) {
    my $result = $call->{result}[0];
    my $path = ref($result) eq 'HASH' ? $result->{'qemu-img-path'} : undef;
    return q(must return a hash with 'qemu-img-path', not ) . shown($result)
        if !defined($path) || ref($path) || $path eq '';
    return taint_problem(q('qemu-img-path'), $path);
}

my %rules = (
    provider_name => \&provider_name,
    backup_init => \&backup_init,
    backup_get_mechanism => \&backup_get_mechanism,
    backup_vm_query_incremental => \&backup_vm_query_incremental,
    backup_vm => \&backup_vm,
    backup_cleanup => \&backup_cleanup,
    restore_get_mechanism => \&restore_get_mechanism,
    archive_get_guest_config => config('guest-config'),
    archive_get_firewall_config => config('firewall-config'),
    restore_vm_init => \&restore_vm_init,
    restore_vm_volume_init => \&restore_vm_volume_init,
);

# VZDump ends the job only if it gets the text of its signal handler.
my sub death_problem ($call, $expected) {
    my ($method, $error) = $call->@{qw(method error)};
    return if $method eq 'backup_vm' && $expected->{fails};
    return "died: $error" if !$call->{interrupted};
    return if $call->{said} =~ m/\Ainterrupted by signal$/;
    return
        "must pass on the exception of a signal handler as it is, or VZDump continues with the next guest; died: $call->{said}";
}

# Says what is wrong with a call, if anything. In a backup that must fail or is interrupted, backup_vm must die.
sub problem ($call, $expected) {
    return death_problem($call, $expected) if defined($call->{error});
    my $rule = $rules{ $call->{method} } or return;
    return $rule->($call, $expected);
}

1;

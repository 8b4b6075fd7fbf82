package PVE::BackupAccess::CLI::Access;

# Converts the options about the guest to those of PVE::BackupAccess.

use v5.36;

use Exporter qw(import);
use List::Util qw(uniq);

use PVE::BackupAccess::CLI qw(absolute);
use PVE::BackupAccess::CLI::Output qw(say_error);
use PVE::BackupAccess;

our @EXPORT_OK = qw(access_options bitmap_of is_tied show_wait status_of text);

# The default directory of fleecing images.
my $fleecing_dir = '/var/tmp';

# Names in QEMU are text; arguments are bytes.
sub text ($bytes) {
    utf8::decode($bytes);
    return $bytes;
}

# The options of PVE::BackupAccess->new, except the target.
sub access_options ($opt) {
    my %options = (qmp => $opt->{qmp});
    $options{'fleecing-dir'}
        = absolute($opt->{'fleecing-dir'} // $fleecing_dir);
    $options{$_} = absolute($opt->{$_})
        for grep { defined($opt->{$_}) } qw(run-dir qemu-run-dir qemu-fleecing-dir);
    $options{$_} = $opt->{$_} for grep { defined($opt->{$_}) } qw(qemu-user qemu-group);
    return %options;
}

# A log function for commands whose result contains all other lines: shows that the command waits for the monitor.
sub show_wait ($level, $message) {
    say_error($message) if $message =~ m/\Awaiting for the QMP monitor /;
}

sub status_of ($opt) {
    return PVE::BackupAccess->status(access_options($opt), log => \&show_wait);
}

# Whether the bitmap has a companion, which may contain the ID of a backup.
sub is_tied ($bitmap) { return $bitmap->{name} =~ m/\Apba-tied:/ }

# The bitmap of a device with these names, from status. Without --target-id, it must be the only one.
sub bitmap_of ($opt, $device, @names) {
    my $target = defined($opt->{'target-id'}) ? text($opt->{'target-id'}) : undef;
    my @all = grep { defined($_->{'target-id'}) } status_of($opt)->{bitmaps}->@*;
    my %is_name = map { $_ => 1 } $device, @names;
    my @bitmaps = grep { $is_name{ $_->{device} // '' } && !$_->{background} } @all;
    my @known = @bitmaps ? () : uniq(sort grep { defined } map { $_->{device} } @all);
    my @found = grep { !defined($target) || $_->{'target-id'} eq $target } @bitmaps;
    my %has_tied = map { $_->{'target-id'} => 1 } grep { is_tied($_) } @found;
    @found = grep { is_tied($_) || !$has_tied{ $_->{'target-id'} } } @found;
    my $for = defined($target) ? "of target '$target' " : '';
    die "device $device: has no bitmap ${for}yet - a backup creates one; 'pve-backup-access status'"
        . " shows the bitmaps there are"
        . (@known ? '; devices that have one: ' . join(', ', @known) : '') . "\n"
        if !@found;
    die "device $device: has bitmaps of several targets - choose one with --target-id: "
        . join(', ', sort map { $_->{'target-id'} } @found) . "\n"
        if @found > 1;
    die
        "device $device: the bitmap of target '$found[0]{'target-id'}' is inconsistent and cannot be used -"
        . " the next backup is a full one\n"
        if $found[0]{inconsistent};
    return $found[0];
}

1;
